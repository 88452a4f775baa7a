"""Approach 3 finds the surface without noise, and what variable projection finds with it."""

import numpy as np
import pytest
from scaling_grids import BUDGETS, SURFACES, noisy
from scipy.optimize import approx_fprime

from equipoise.scaling import fit_approach3, fit_scaling_law, grid_of
from equipoise.scaling.approach3 import _score


@pytest.mark.parametrize("name", SURFACES)
@pytest.mark.parametrize("huber", [1e-3, None])
def test_recovery_without_noise(name, huber):
    grid = grid_of(SURFACES[name], BUDGETS, points=15, width=8.0)
    assert fit_approach3(grid, huber) == pytest.approx(SURFACES[name], rel=1e-5)


def test_with_little_noise_it_agrees_with_variable_projection():
    runs = noisy(SURFACES["Chinchilla"], 1e-4)
    law = fit_scaling_law(runs, bootstraps=0)
    assert fit_approach3(runs, None) == pytest.approx(law.surface, rel=1e-3)


@pytest.mark.parametrize("huber", [1e-3, None])
def test_its_gradient_is_that_of_finite_differences(huber):
    runs = noisy(SURFACES["Chinchilla"], 0.01)
    logs = np.log(runs.params), np.log(runs.tokens)
    point = np.array([0.5, 5.9, 6.1, 0.33, 0.29])
    score, gradient = _score(point, logs, np.log(runs.loss), huber)
    expected = approx_fprime(point, lambda x: _score(x, logs, np.log(runs.loss), huber)[0], 1e-7)
    assert gradient == pytest.approx(expected, rel=1e-3)
    assert score > 0
