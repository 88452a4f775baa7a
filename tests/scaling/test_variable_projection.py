"""Variable projection: the inner solve, the gradient, and the search."""

import numpy as np
import pytest
from scaling_grids import ASYMMETRIC, BUDGETS, noisy
from scipy.optimize import approx_fprime, lsq_linear

from equipoise.scaling import grid_of
from equipoise.scaling.form import CHINCHILLA, form_of
from equipoise.scaling.variable_projection import Projection, best_of_grid, refine, search


def projection(runs, **settings):
    return Projection(CHINCHILLA.log_features({"params": runs.params / 1e6, "tokens": runs.tokens / 1e9}), **settings)


def test_columns_by_hand():
    form = form_of(("granularity",))
    values = {"params": np.array([4.0]), "tokens": np.array([9.0]), "granularity": np.array([16.0])}
    columns = Projection(form.log_features(values)).columns(np.array([0.5, 0.5, 0.25]))
    assert columns[0].tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 2 / 2])  # 1, N^-a, D^-b, N^-a G^-d


@pytest.mark.parametrize(("inner", "lower"), [("nnls", 0.0), ("ols", -np.inf)])
def test_coefficients_are_those_of_a_bounded_solver(inner, lower):
    runs = noisy(ASYMMETRIC, 0.3, seed=1, points=5)
    ours = projection(runs, inner=inner)
    for exponents in np.random.default_rng(0).uniform(0.05, 0.95, (20, 2)):
        columns = ours.columns(exponents)
        found, _ = ours.solve(columns, runs.loss)
        expected = lsq_linear(columns, runs.loss, (lower, np.inf), tol=1e-14).x
        residuals = runs.loss - columns @ expected
        assert ours.score(exponents, runs.loss) <= residuals @ residuals * (1 + 1e-9)
        assert (found >= lower).all()


@pytest.mark.parametrize("settings", [{"inner": "ols"}, {"inner": "nnls"}, {"inner": "ols", "huber": 0.02}])
def test_the_gradient_is_that_of_finite_differences(settings):
    runs = noisy(ASYMMETRIC, 0.02, seed=2, points=5)
    ours = projection(runs, **settings)
    point = np.array([0.461, 0.156])
    score, gradient = ours.score_and_gradient(point, runs.loss)
    assert score == pytest.approx(ours.score(point, runs.loss))
    assert gradient == pytest.approx(approx_fprime(point, ours.score, 1e-7, runs.loss), rel=2e-3)


def test_the_jacobian_is_that_of_finite_differences():
    runs = noisy(ASYMMETRIC, 0.01, points=5)
    ours, point = projection(runs), np.array([0.44, 0.17])
    coefficients, _ = ours.solve(ours.columns(point), runs.loss)
    expected = approx_fprime(np.r_[coefficients, point], lambda values: ours.columns(values[3:]) @ values[:3], 1e-7)
    assert ours.jacobian(point, coefficients) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_capped_residual_counts_linearly():
    runs = noisy(ASYMMETRIC, 0.001, seed=3)
    runs.loss[5] += 2.0  # a diverged run
    plain, capped = projection(runs), projection(runs, huber=0.003)
    off = [search(each, runs.loss, "nelder-mead") - [0.465, 0.155] for each in (plain, capped)]
    assert np.abs(off[1]).max() < 0.01 < np.abs(off[0]).max()
    residuals = np.array([0.5, -2.0])
    assert capped._capped(residuals) == pytest.approx(2 * 0.003 * 2.5 - 2 * 0.003**2)


@pytest.mark.parametrize("solver", ["nelder-mead", "l-bfgs-b"])
def test_both_solvers_find_the_same(solver):
    runs = noisy(ASYMMETRIC, 0.02, seed=4)
    ours = projection(runs)
    found = search(ours, runs.loss, solver)
    around = found + np.array([[1e-4, 0], [-1e-4, 0], [0, 1e-4], [0, -1e-4]])
    assert all(ours.score(found, runs.loss) < ours.score(point, runs.loss) for point in around)
    assert found == pytest.approx(search(ours, runs.loss, "nelder-mead"), abs=1e-6)


def test_the_exhaustive_grid_hits_what_lies_on_it():
    grid = grid_of(ASYMMETRIC._replace(alpha=0.47, beta=0.15), BUDGETS, points=5, width=8.0)
    assert search(projection(grid), grid.loss, "grid") == pytest.approx([0.47, 0.15], abs=1e-12)


def test_the_start_is_the_best_of_the_grid():
    runs = noisy(ASYMMETRIC, 0.01)
    ours = projection(runs)
    axis = np.linspace(0.01, 0.99, 7)
    scores = {(a, b): ours.score(np.array([a, b]), runs.loss) for a in axis for b in axis}
    assert tuple(best_of_grid(ours, runs.loss, 7)) == min(scores, key=scores.get)


def test_refining_an_exact_start_stays_there():
    grid = grid_of(ASYMMETRIC, BUDGETS, points=5, width=8.0)
    start = np.array([0.465, 0.155])
    assert refine(projection(grid), grid.loss, start, "nelder-mead") == pytest.approx(start, rel=1e-9)
