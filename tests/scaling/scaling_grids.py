"""Surfaces and grids that the tests share."""

from __future__ import annotations

import numpy as np

from equipoise.scaling import Runs, Surface, grid_of

SYMMETRIC = Surface(1.69, 400.0, 400.0, 0.31, 0.31)
CHINCHILLA = Surface(1.69, 406.4, 410.7, 0.34, 0.28)
ASYMMETRIC = Surface(1.69, 406.4, 410.7, 0.465, 0.155)
PACKAGE = Surface(1.5, 200.0, 800.0, 0.5, 0.2)  # the one that the tests of the vpnls package use
SURFACES = {"symmetric": SYMMETRIC, "Chinchilla": CHINCHILLA, "asymmetric": ASYMMETRIC, "package": PACKAGE}
BUDGETS = np.logspace(17, 21, 5)


def noisy(surface: Surface, noise: float, seed: int = 0, budgets: int = 5, points: int = 7, width: float = 8.0) -> Runs:
    """A centred grid from 1e17 to 1e21 FLOPs with Gaussian noise."""
    grid = grid_of(surface, np.geomspace(1e17, 1e21, budgets), points=points, width=width)
    loss = grid.loss + np.random.default_rng(seed).normal(0, noise, len(grid.loss))
    return Runs(grid.params, grid.tokens, loss, grid.flops)
