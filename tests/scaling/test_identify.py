"""Runs that cannot identify a law are refused by the name of its parameters, loose ones are warned of."""

import numpy as np
import pytest
from scaling_grids import BUDGETS, CHINCHILLA, noisy

from equipoise.errors import UserError
from equipoise.scaling import Runs, fit_scaling_law, grid_of
from equipoise.scaling.identify import budgets_of

GRID = grid_of(CHINCHILLA, BUDGETS, points=7, width=8.0)


def runs_at(params, tokens, **columns):
    params, tokens = np.broadcast_arrays(np.asarray(params, float), np.asarray(tokens, float))
    return Runs.of(params=params, tokens=tokens, loss=CHINCHILLA.loss(params, tokens), **columns)


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        (lambda: runs_at(GRID.params[:7], GRID.tokens[:7]), "about 1e.17 FLOPs; alpha and beta cannot be told apart"),
        (lambda: runs_at(1e9, GRID.tokens), "1 different params, too few to tell A, alpha and E apart"),
        (lambda: runs_at(GRID.params, 1e9), "1 different tokens, too few to tell B, beta and E apart"),
        (lambda: runs_at(np.tile([1e8, 1e9], 5), np.geomspace(1e9, 1e11, 10)), "2 different params"),
        (
            lambda: runs_at(GRID.params, 20 * GRID.params),
            "params and tokens only move together, so A, alpha",
        ),
        (lambda: runs_at([1e7, 1e8, 1e9, 1e8], [1e9, 1e9, 1e10, 1e11]), "4 runs cannot tell 5 parameters"),
    ],
)
def test_what_cannot_be_identified_is_refused(runs, sentence):
    with pytest.raises(UserError, match=sentence):
        fit_scaling_law(runs(), bootstraps=0)


def test_a_fixed_sparsity_cannot_tell_total_from_active_parameters():
    runs = runs_at(GRID.params, GRID.tokens, total=8 * GRID.params)
    with pytest.raises(UserError, match="params and total only move together, so A, alpha and T, gamma"):
        fit_scaling_law(runs, extra=("total",), bootstraps=0)


def test_a_loose_exponent_is_warned_of():
    law = fit_scaling_law(noisy(CHINCHILLA, 0.3, points=5, width=2.0), bootstraps=20)
    assert any("hardly determine" in sentence for sentence in law.warnings)
    assert not fit_scaling_law(noisy(CHINCHILLA, 0.001), bootstraps=20).warnings


@pytest.mark.parametrize(("offset", "side"), [(-2.0, "smaller"), (2.0, "larger")])
def test_grids_beside_the_optimum_are_warned_of(offset, side):
    grid = grid_of(CHINCHILLA, BUDGETS, points=5, width=2.0, offsets=np.full(5, offset))
    warnings = fit_scaling_law(grid, bootstraps=0).warnings
    assert f"At 1e+17, 1e+18, 1e+19, 1e+20, 1e+21 FLOPs all runs are {side} than the best size." in warnings


def test_few_sizes_at_a_budget_are_warned_of():
    warnings = fit_scaling_law(grid_of(CHINCHILLA, BUDGETS, points=4, width=8.0), bootstraps=0).warnings
    assert warnings[0] == "At 1e+17, 1e+18, 1e+19, 1e+20, 1e+21 FLOPs there are fewer than 5 runs."


def test_budgets_are_told_apart():
    found = budgets_of(np.array([3e17, 1.01e17, 1e17, 3.1e17, 1e19]))
    assert [sorted(members.tolist()) for members in found.values()] == [[1, 2], [0, 3], [4]]
    assert list(found) == pytest.approx([1.005e17, 3.05e17, 1e19])
