"""The fit as a whole: recovery, intervals, refusals."""

import csv

import numpy as np
import pytest
from scaling_grids import BUDGETS, CHINCHILLA, SURFACES, noisy

from equipoise.errors import UserError
from equipoise.scaling import Runs, Surface, fit_scaling_law, grid_of
from equipoise.scaling.form import form_of

NAMES = Surface._fields


@pytest.mark.parametrize("name", SURFACES)
@pytest.mark.parametrize(("solver", "inner"), [("nelder-mead", "nnls"), ("l-bfgs-b", "ols")])
@pytest.mark.parametrize("width", [2.0, 100.0])
def test_recovery_without_noise(name, solver, inner, width):
    """To 1e-8 relative, where 1e-6 is asked for."""
    grid = grid_of(SURFACES[name], BUDGETS, points=15, width=width)
    law = fit_scaling_law(grid, solver=solver, inner=inner, bootstraps=0)
    assert [getattr(law, field) for field in NAMES] == pytest.approx(list(SURFACES[name]), rel=1e-8)


@pytest.mark.parametrize(("params_unit", "tokens_unit"), [(1.0, 1.0), (1e3, 1e-2)])
def test_arrays_lists_and_units(params_unit, tokens_unit):
    grid = grid_of(CHINCHILLA, BUDGETS, points=5, width=8.0)
    law = fit_scaling_law(list(grid.params * params_unit), tuple(grid.tokens * tokens_unit), grid.loss, bootstraps=0)
    assert law.alpha == pytest.approx(0.34, rel=1e-8)
    assert pytest.approx(406.4 * params_unit**0.34, rel=1e-7) == law.A
    assert pytest.approx(410.7 * tokens_unit**0.28, rel=1e-7) == law.B


def test_from_a_file(tmp_path):
    grid = grid_of(CHINCHILLA, BUDGETS, points=5, width=8.0)
    with (tmp_path / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["loss", "tokens", "params", "seed"])
        writer.writerows(zip(grid.loss, grid.tokens, grid.params, range(25)))
    assert fit_scaling_law(tmp_path / "runs.csv", bootstraps=0).beta == pytest.approx(0.28, rel=1e-8)


EXTRA = {"T": 30.0, "P": 0.02, "R": 50.0, "gamma": 0.25, "lambda": 0.5, "delta": 0.6}


@pytest.mark.parametrize("extra", [("total",), ("granularity",), ("total", "sparsity")])
def test_recovery_of_extra_terms(extra):
    grid = grid_of(CHINCHILLA, BUDGETS[:4], points=5, width=8.0)
    params, tokens, flops = (np.tile(values, 9) for values in (grid.params, grid.tokens, grid.flops))
    density, granularity = (np.repeat(v, 20) for v in (np.tile([0.5, 0.1, 0.03], 3), np.repeat([1.0, 4.0, 16.0], 3)))
    form = form_of(extra)
    values = {"params": params, "tokens": tokens, "total": params / density, "density": density}
    values["granularity"] = granularity
    truth = EXTRA | CHINCHILLA._asdict()
    loss = form.loss(np.array([[truth[name] for name in form.parameters]]), values)[0]
    runs = Runs(params, tokens, loss, flops, params / density, granularity)
    law = fit_scaling_law(runs, extra=extra, solver="l-bfgs-b", bootstraps=0)
    assert law.parameters == pytest.approx({name: truth[name] for name in form.parameters}, rel=1e-3)
    assert law.predict(runs.features()) == pytest.approx(loss, rel=1e-7)


def test_equal_seeds_give_equal_intervals():
    runs = noisy(CHINCHILLA, 0.01)
    laws = [fit_scaling_law(runs, solver="l-bfgs-b", bootstraps=10, seed=seed) for seed in (3, 3, 4)]
    assert laws[0].intervals == laws[1].intervals != laws[2].intervals
    assert laws[0].parameters == laws[2].parameters


def test_a_coefficient_at_zero_is_reported():
    grid = grid_of(CHINCHILLA._replace(E=-0.4), BUDGETS, points=7, width=8.0)
    law = fit_scaling_law(grid, bootstraps=0)
    assert law.E == 0
    assert any("Bound hit: E is 0" in sentence for sentence in law.warnings)
    assert pytest.approx(-0.4) == fit_scaling_law(grid, inner="ols", bootstraps=0).E


def test_an_exponent_at_the_edge_is_reported():
    grid = grid_of(CHINCHILLA._replace(alpha=1.4, A=4e7), BUDGETS, points=7, width=8.0)
    law = fit_scaling_law(grid, bootstraps=0)
    assert any(sentence.startswith("Bound hit: alpha ended at 0.99") for sentence in law.warnings)


def test_as_many_runs_as_parameters_leave_no_intervals():
    grid = grid_of(CHINCHILLA, BUDGETS[:2], points=3, width=8.0)
    few = Runs(grid.params[1:], grid.tokens[1:], grid.loss[1:], grid.flops[1:])
    law = fit_scaling_law(few)
    assert law.intervals["alpha"] == (-np.inf, np.inf)
    assert any("No intervals" in sentence for sentence in law.warnings)


@pytest.mark.parametrize(
    ("arguments", "settings", "sentence"),
    [
        (([1e6] * 4,), {}, "needs params, tokens and loss"),
        (("grid", [1e9]), {}, "alone"),
        (("grid",), {"solvr": "grid"}, "Unknown setting solvr; there are extra, solver"),
        (("grid",), {"solver": "newton"}, "solver must be one of nelder-mead, l-bfgs-b, grid, not 'newton'"),
        (("grid",), {"inner": "lasso"}, "inner must be one of nnls, ols"),
        (("grid",), {"huber": 0.0}, "huber must be above 0"),
        (("grid",), {"bootstraps": -1}, "bootstraps must be at least 0"),
        (("grid",), {"confidence": 95.0}, "confidence must be between 0 and 1"),
        (("grid",), {"extra": ("depth",)}, "extra terms are total, sparsity, granularity, not depth"),
        (("grid",), {"extra": ("total",)}, "reads total: give this column"),
        (("grid",), {"extra": ("total",), "solver": "grid"}, "pairs of exponents only"),
    ],
)
def test_misuse_is_one_sentence(arguments, settings, sentence):
    grid = grid_of(CHINCHILLA, BUDGETS, points=5, width=8.0)
    arguments = [grid if argument == "grid" else argument for argument in arguments]
    with pytest.raises(UserError, match=sentence) as error:
        fit_scaling_law(*arguments, **settings)
    assert "\n" not in str(error.value)
