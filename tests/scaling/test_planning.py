"""Plans: which sizes, how many tokens, and what cannot be planned."""

import numpy as np
import pytest
from scaling_grids import BUDGETS, CHINCHILLA

from equipoise.errors import UserError
from equipoise.scaling import fit_scaling_law, grid_of, plan_isoflop

SIZES = np.geomspace(1e4, 1e8, 81)


def flops_per_token(position):
    return 7.0 * SIZES[position]


def test_a_plan_by_hand():
    """A budget of 1.2e14 pays for 20 tokens per parameter at 1e6 parameters: sqrt(1.2e14 / 120)."""
    plan = plan_isoflop([1.2e14, 1.2e12], SIZES, flops_per_token, points=5, width=10.0)
    assert [run.budget for run in plan] == [1.2e12] * 5 + [1.2e14] * 5
    assert [run.params for run in plan[5:]] == pytest.approx([1e5, 10**5.5, 1e6, 10**6.5, 1e7])
    assert [run.params for run in plan[:5]] == pytest.approx([1e4, 10**4.5, 1e5, 10**5.5, 1e6])
    for run in plan:
        assert SIZES[run.size] == run.params
        assert run.tokens * 7 * run.params == pytest.approx(run.budget)


def test_a_guess_moves_the_centre():
    plan = plan_isoflop([1e12, 1e14], SIZES, flops_per_token, width=4.0, guess=lambda budget: 3e5)
    for budget in (1e12, 1e14):
        logs = np.log([run.params for run in plan if run.budget == budget])
        assert len(set(logs)) == 7
        assert np.exp(logs.mean()) == pytest.approx(3e5, rel=0.1)
        assert np.exp(logs.max() - logs.min()) == pytest.approx(16, rel=0.15)


def test_what_is_planned_can_be_fitted():
    plan = plan_isoflop(BUDGETS, np.geomspace(1e6, 1e11, 80), lambda place: 6 * np.geomspace(1e6, 1e11, 80)[place])
    params, tokens = np.array([(run.params, run.tokens) for run in plan]).T
    law = fit_scaling_law(params, tokens, CHINCHILLA.loss(params, tokens), bootstraps=0)
    assert law.surface == pytest.approx(CHINCHILLA, rel=1e-7)


@pytest.mark.parametrize(
    ("budgets", "sizes", "settings", "sentence"),
    [
        ([1e13], SIZES, {}, "two budgets or more"),
        ([1e13, 1e13], SIZES, {}, "two budgets or more"),
        ([-1.0, 1e13], SIZES, {}, "must be above 0 FLOPs"),
        ([1e13, 1e14], SIZES, {"points": 4}, "at least 5 points, not 4"),
        ([1e13, 1e14], SIZES, {"width": 1.0}, "width must be above 1"),
        ([1e13, 1e14], [], {}, "Sizes must be parameter counts"),
        ([1e13, 1e20], SIZES, {}, r"Around 1e\+20 FLOPs there are 0 candidate sizes from 2.3e\+08 to 3.7e\+09"),
    ],
)
def test_what_cannot_be_planned_is_refused(budgets, sizes, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        plan_isoflop(budgets, sizes, flops_per_token, **settings)


def test_a_grid_lies_where_it_is_said_to():
    grid = grid_of(CHINCHILLA, [1e18, 1e20], points=3, width=4.0, offsets=[0.0, np.log(3)])
    best = CHINCHILLA.best_params(np.array([1e18, 1e20]))
    assert grid.params.reshape(2, 3) == pytest.approx(best[:, None] * [[0.25, 1, 4], [0.75, 3, 12]])
    assert (6 * grid.params * grid.tokens).tolist() == pytest.approx([1e18] * 3 + [1e20] * 3)
    assert grid.loss.tolist() == pytest.approx(CHINCHILLA.loss(grid.params, grid.tokens).tolist())
