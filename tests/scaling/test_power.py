"""Simulated precision: it shrinks as theory says, and power is what its formula says."""

import numpy as np
import pytest
from scaling_grids import BUDGETS, CHINCHILLA

from equipoise.errors import UserError
from equipoise.scaling import Precision, fit_scaling_law, grid_of, simulate
from equipoise.scaling.runs import Runs

GRID = grid_of(CHINCHILLA, BUDGETS, points=7, width=8.0)


def test_noise_scales_all_of_it():
    one, four = (simulate(CHINCHILLA, GRID, noise, 1e23, repeats=40) for noise in (5e-4, 2e-3))
    for name in ("alpha", "beta", "a", "loss"):
        assert getattr(four, name) == pytest.approx(4 * getattr(one, name), rel=0.05)
    assert np.log(four.params_factor) == pytest.approx(4 * np.log(one.params_factor), rel=0.05)
    assert one.runs == 35


def test_it_agrees_with_the_intervals_of_a_study():
    found = simulate(CHINCHILLA, GRID, 0.004, 1e23, repeats=60)
    rng = np.random.default_rng(1)
    runs = Runs(GRID.params, GRID.tokens, GRID.loss + rng.normal(0, 0.004, 35), GRID.flops)
    law = fit_scaling_law(runs, solver="l-bfgs-b", bootstraps=60)
    low, high = law.intervals["alpha"]
    assert (high - low) / (2 * 1.96) == pytest.approx(found.alpha, rel=0.5)


def test_power_by_hand():
    found = Precision(runs=35, alpha=0.0, beta=0.0, a=0.0, params_factor=1.0, loss=0.01)
    assert found.detectable_loss() == pytest.approx(2.8016 * 0.0141421, rel=1e-4)
    assert found.power(found.detectable_loss()) == pytest.approx(0.8, abs=1e-4)
    assert found.power(0.0) == pytest.approx(0.05)
    assert found.power(-1.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("noise", "repeats", "budgets", "sentence"),
    [(0.0, 9, BUDGETS, "noise must be"), (0.1, 1, BUDGETS, "repeats must be"), (0.1, 9, BUDGETS[:1], "one budget")],
)
def test_misuse(noise, repeats, budgets, sentence):
    with pytest.raises(UserError, match=sentence):
        simulate(CHINCHILLA, grid_of(CHINCHILLA, budgets, points=7, width=8.0), noise, 1e23, repeats=repeats)
