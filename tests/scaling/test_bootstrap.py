"""Intervals: what the draws are made of, and that they hold the truth as often as they promise."""

import numpy as np
import pytest
from scaling_grids import CHINCHILLA, noisy

from equipoise.scaling import Surface, fit_scaling_law
from equipoise.scaling.bootstrap import interval_of, redraw
from equipoise.scaling.form import CHINCHILLA as FORM
from equipoise.scaling.variable_projection import Projection, search


def test_an_interval_is_rounded_outward():
    draws = np.arange(101.0)
    assert interval_of(draws, 0.95) == (2.0, 98.0)
    assert interval_of(np.r_[draws, np.nan], 0.5) == (25.0, 75.0)
    assert interval_of(np.array([1.0, np.inf]), 0.9) == (1.0, np.inf)
    assert interval_of(np.empty(0), 0.9) == (-np.inf, np.inf)


def test_draws_scatter_around_the_fit_as_the_noise_does():
    """With 35 runs and 5 parameters: variance times 30 / 28 from the chi-square factor, known to 30 %."""
    noise, variances = 0.01, []
    for seed in range(6):
        runs = noisy(CHINCHILLA, noise, seed)
        projection = Projection(FORM.log_features({"params": runs.params / 1e8, "tokens": runs.tokens / 1e9}))
        exponents = search(projection, runs.loss, "l-bfgs-b")
        columns = projection.columns(exponents)
        fit = columns @ projection.solve(columns, runs.loss)[0]
        draws = redraw(projection, runs.loss, exponents, 400, np.random.default_rng(seed))
        assert draws.mean(0) == pytest.approx(fit, abs=5 * noise / 20)
        variances.append((draws - fit).var())
    assert np.mean(variances) == pytest.approx(noise**2 * 30 / 28, rel=0.3)


def test_more_noise_widens_the_intervals_in_proportion():
    widths = []
    for noise in (0.001, 0.004):
        low, high = fit_scaling_law(noisy(CHINCHILLA, noise), solver="l-bfgs-b", bootstraps=60).intervals["beta"]
        widths.append(high - low)
    assert widths[1] / widths[0] == pytest.approx(4, rel=0.1)


def held(seed, **layout):
    """Which of a study's intervals hold the truth."""
    law = fit_scaling_law(noisy(CHINCHILLA, 0.02, seed, **layout), solver="l-bfgs-b", bootstraps=100, seed=seed)
    truth = CHINCHILLA._asdict() | {"params": CHINCHILLA.best_params(1e23)}
    intervals = law.intervals | {"params": law.optimum(1e23).intervals["params"]}
    return [intervals[name].low <= value <= intervals[name].high for name, value in truth.items()]


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_promise():
    """95 % of 250 studies of 15 runs, within their chance; without the chi-square factor it is 90 %."""
    share = np.mean([held(seed, budgets=3, points=5) for seed in range(250)], axis=0)
    assert len(share) == len(Surface._fields) + 1
    assert share.mean() > 0.92
    assert share.min() > 0.90
