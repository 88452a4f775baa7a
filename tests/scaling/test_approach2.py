"""Approach 2 and its bias, against the published tables: every figure, to the printed digits."""

import numpy as np
import pytest
from scaling_grids import ASYMMETRIC, BUDGETS, CHINCHILLA, SURFACES, SYMMETRIC

from equipoise.errors import UserError
from equipoise.scaling import Runs, approach2_bias, fit_approach2, grid_of
from equipoise.scaling.approach2 import leading_shift, vertex_shift

WIDTHS = (2.0, 4.0, 8.0, 16.0)
CENTRED, OFFSET, DRIFT = np.zeros(5), np.full(5, -np.log(3)), -np.linspace(0, np.log(3), 5)
TABLE = [  # arXiv 2603.22339: error of D* at 1e24 FLOPs in per cent
    ("symmetric", CENTRED, (0.0, 0.0, 0.0, 0.0)),
    ("Chinchilla", CENTRED, (-0.33, -1.30, -2.90, -5.10)),
    ("asymmetric", CENTRED, (-1.67, -6.50, -13.91, -23.12)),
    ("symmetric", OFFSET, (3.97, 3.47, 2.65, 1.51)),
    ("Chinchilla", OFFSET, (7.11, 5.69, 3.38, 0.24)),
    ("asymmetric", OFFSET, (19.22, 14.41, 6.96, -2.42)),
    ("symmetric", DRIFT, (6.07, 5.17, 3.70, 1.69)),
    ("Chinchilla", DRIFT, (11.61, 9.83, 6.94, 3.05)),
    ("asymmetric", DRIFT, (34.57, 30.04, 22.97, 14.00)),
]


@pytest.mark.parametrize(("name", "offsets", "published"), TABLE)
def test_the_published_tables(name, offsets, published):
    surface = SURFACES[name]
    for width, percent in zip(WIDTHS, published):
        grid = grid_of(surface, BUDGETS, points=15, width=width, offsets=offsets)
        ran = 100 * (fit_approach2(grid).tokens(1e24) / surface.best_tokens(1e24) - 1)
        assert round(100 * approach2_bias(surface, grid).tokens_error(1e24), 2) == percent
        assert round(float(ran), 2) == percent


def test_the_exponent_is_biased_by_drift_only():
    centred, drifting = (
        grid_of(ASYMMETRIC, BUDGETS, points=15, width=8.0, offsets=offsets) for offsets in (OFFSET, DRIFT)
    )
    assert approach2_bias(ASYMMETRIC, centred).exponent == pytest.approx(0, abs=1e-12)
    bias = approach2_bias(ASYMMETRIC, drifting)
    assert bias.exponent < -0.005
    assert fit_approach2(drifting).a == pytest.approx(0.25 + bias.exponent)
    assert fit_approach2(drifting).b == pytest.approx(0.75 - bias.exponent)
    ratio = fit_approach2(drifting).params(1e24) / ASYMMETRIC.best_params(1e24)
    assert bias.params_error(1e24) == pytest.approx(ratio - 1)


def test_the_intercept_of_the_papers_text():
    """Its "4.1 %" is the relative error of the log10 intercept of D*, -0.5554 against -0.5781."""
    grid = grid_of(CHINCHILLA, BUDGETS, points=15, width=16.0)
    found = fit_approach2(grid)
    intercepts = [
        np.log10(tokens / 1e20**b)
        for tokens, b in ((CHINCHILLA.best_tokens(1e20), CHINCHILLA.tokens_exponent), (found.tokens(1e20), found.b))
    ]
    assert [round(float(value), 4) for value in intercepts] == [-0.5554, -0.5781]


@pytest.mark.parametrize("points", [5, 15, 101])
def test_the_leading_order_is_what_narrow_grids_tend_to(points):
    for half_width, tolerance in ((0.02, 1e-4), (0.2, 1e-2)):
        exact = vertex_shift(0.465, 0.155, np.linspace(-half_width, half_width, points))
        assert leading_shift(0.465, 0.155, half_width, points) == pytest.approx(exact, rel=tolerance)


def test_a_symmetric_surface_has_no_bias():
    assert vertex_shift(0.31, 0.31, np.linspace(-3, 3, 15)) == pytest.approx(0, abs=1e-13)


def test_real_grids_have_runs_that_miss_their_budget_a_little():
    grid = grid_of(SYMMETRIC, BUDGETS, points=7, width=4.0)
    rng = np.random.default_rng(0)
    tokens = grid.tokens * (1 + 0.004 * rng.uniform(-1, 1, len(grid.tokens)))
    runs = Runs.of(params=grid.params, tokens=tokens, loss=SYMMETRIC.loss(grid.params, tokens))
    found = fit_approach2(runs)
    assert len(found.budgets) == 5
    assert found.a == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize(
    ("kept", "loss", "flops", "sentence"),
    [
        (slice(0, 5), None, None, "two budgets"),
        ([0, 1, 5, 6], None, None, r"needs 3 sizes at 1e\+17 FLOPs; there are 2"),
        (slice(None), -1.0, None, "no lowest point"),
        (slice(None), None, np.r_[np.geomspace(1e17, 1.4e17, 9), 1e19], "needs budgets"),
    ],
)
def test_grids_without_an_answer_are_refused(kept, loss, flops, sentence):
    grid = grid_of(SYMMETRIC, BUDGETS[:2], points=5, width=4.0)
    columns = grid.params, grid.tokens, (loss or 1.0) * grid.loss, grid.flops if flops is None else flops
    with pytest.raises(UserError, match=sentence):
        fit_approach2(Runs(*(column[kept] for column in columns)))
