"""Crossings: found where they are, denied where there are none, and left open where nobody can tell."""

import numpy as np
import pytest
from scaling_grids import BUDGETS, CHINCHILLA
from scipy.optimize import brentq

from equipoise.errors import UserError
from equipoise.scaling import Runs, Surface, find_crossing, fit_scaling_law, grid_of

STEEP = Surface(1.69, 1600.0, 1000.0, 0.42, 0.32)  # worse at small budgets, better at large ones


def law_of(surface, noise=1e-4, seed=0, bootstraps=40, **settings):
    grid = grid_of(surface, BUDGETS, points=7, width=8.0)
    loss = grid.loss + np.random.default_rng(seed).normal(0, noise, len(grid.loss))
    runs = Runs(grid.params, grid.tokens, loss, grid.flops)
    return fit_scaling_law(runs, solver="l-bfgs-b", bootstraps=bootstraps, seed=seed, **settings)


@pytest.fixture(scope="module")
def laws():
    return law_of(CHINCHILLA), law_of(STEEP, seed=1)


def test_a_crossing_is_found_where_the_surfaces_cross(laws):
    truth = brentq(lambda log: CHINCHILLA.best_loss(10**log) - STEEP.best_loss(10**log), 17, 23)
    found = find_crossing(*laws, 1e17, 1e23)
    assert found.verdict == "crossing"
    assert (found.better_at_low, found.better_at_high) == (0, 1)
    assert found.interval.low <= 10**truth <= found.interval.high
    assert found.flops == pytest.approx(10**truth, rel=0.05)
    assert found.probability == 1.0
    assert "steep overtakes plain at" in found.sentence("plain", "steep")
    turned = find_crossing(laws[1], laws[0], 1e17, 1e23)
    assert (turned.better_at_low, turned.better_at_high) == (1, 0)
    assert turned.flops == pytest.approx(found.flops, rel=0.01)


def test_none_is_an_answer(laws):
    found = find_crossing(*laws, 1e22, 1e24)
    assert (found.verdict, found.flops, found.interval) == ("none", None, None)
    assert (found.better_at_low, found.better_at_high) == (1, 1)
    assert found.sentence("plain", "steep").startswith(
        "No crossing from 1e+22 to 1e+24 FLOPs: steep stays ahead of plain"
    )


def test_two_studies_of_one_surface_are_undecided():
    found = find_crossing(law_of(CHINCHILLA, 0.01), law_of(CHINCHILLA, 0.01, seed=5), 1e17, 1e21)
    assert found.verdict == "undecided"
    assert found.probability < 0.95
    assert "Undecided" in found.sentence("a", "b")


@pytest.mark.slow
def test_equal_methods_are_rarely_told_apart():
    """Of 60 pairs of studies of one surface, about 5 % may end with a verdict at 95 % confidence."""
    verdicts = [
        find_crossing(law_of(CHINCHILLA, 0.01, 2 * pair), law_of(CHINCHILLA, 0.01, 2 * pair + 1), 1e20, 1e21).verdict
        for pair in range(60)
    ]
    assert verdicts.count("undecided") >= 60 - 9


def test_misuse(laws):
    with pytest.raises(UserError, match="must rise from above 0"):
        find_crossing(*laws, 1e20, 1e19)
    with pytest.raises(UserError, match="needs laws with intervals"):
        find_crossing(laws[0], law_of(STEEP, bootstraps=0), 1e17, 1e23)
