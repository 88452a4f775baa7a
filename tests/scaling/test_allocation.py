"""Optima: closed form for dense laws, and a search over experts for the others."""

import numpy as np
import pytest
from scaling_grids import CHINCHILLA, noisy
from scipy.optimize import minimize_scalar

from equipoise.errors import UserError
from equipoise.scaling import Candidates, fit_scaling_law
from equipoise.scaling.allocation import best_expert_model
from equipoise.scaling.form import form_of

FLOPS = 1e21


def theta(form, **values):
    return np.array([[values[name] for name in form.parameters]])


@pytest.fixture(scope="module")
def law():
    return fit_scaling_law(noisy(CHINCHILLA, 0.004), solver="l-bfgs-b", bootstraps=40)


def test_a_dense_optimum(law):
    best = law.optimum(FLOPS)
    assert best.params == pytest.approx(law.surface.best_params(FLOPS))
    assert best.tokens == pytest.approx(FLOPS / (6 * best.params))
    for name in ("params", "tokens", "loss"):
        assert best.intervals[name].low < getattr(best, name) < best.intervals[name].high
        assert best.intervals[name].low < getattr(CHINCHILLA, f"best_{name}")(FLOPS) < best.intervals[name].high
    assert best.experts is best.total is None


def test_without_a_use_for_experts_the_search_agrees_with_the_closed_form():
    form = form_of(("total",))
    values = CHINCHILLA._asdict() | {"T": 0.0, "gamma": 0.3}
    free = Candidates(experts=(4,), router_flops=0.0)
    best = best_expert_model(form, theta(form, **values), FLOPS, 6.0, free, 0.95)
    assert best.params == pytest.approx(CHINCHILLA.best_params(FLOPS), rel=1e-4)
    assert best.tokens == pytest.approx(CHINCHILLA.best_tokens(FLOPS), rel=1e-4)
    assert best.loss == pytest.approx(CHINCHILLA.best_loss(FLOPS), rel=1e-8)
    assert best.total == pytest.approx(best.params * (1 / 3 + 2 / 3 * 4))


def test_sparsity_has_an_optimum_of_its_own():
    form = form_of(("total", "sparsity"))
    values = CHINCHILLA._asdict() | {"T": 30.0, "gamma": 0.25, "P": 0.02, "lambda": 0.5}
    candidates = Candidates(experts=tuple(2**power for power in range(1, 12)), top_k=2, router_flops=0.0)
    best = best_expert_model(form, theta(form, **values), FLOPS, 6.0, candidates, 0.95)
    assert not best.at_edge

    def loss_of(experts):
        def loss(log):
            size = np.exp(log)
            total = candidates.total(np.array([size]), experts)[0]
            sparse = 30.0 * total**-0.25 + 0.02 * (total / size) ** 0.5
            return CHINCHILLA.loss(size, FLOPS / (6 * size)) + sparse

        return minimize_scalar(loss, bounds=(10, 35), method="bounded", options={"xatol": 1e-9}).fun

    losses = {experts: loss_of(experts) for experts in candidates.experts}
    assert best.experts == min(losses, key=losses.get)
    assert best.loss == pytest.approx(min(losses.values()), rel=1e-7)


def test_routing_limits_granularity():
    form = form_of(("granularity",))
    values = CHINCHILLA._asdict() | {"R": 100.0, "delta": 0.6}
    offered = {"experts": (64,), "granularities": tuple(2.0**power for power in range(10))}
    found = {
        cost: best_expert_model(form, theta(form, **values), FLOPS, 6.0, Candidates(**offered, router_flops=cost), 0.95)
        for cost in (0.0, 14.0)
    }
    assert found[0.0].granularity == 512
    assert found[0.0].at_edge == ("granularity",)
    assert 1 < found[14.0].granularity < 512
    assert found[14.0].experts == 64 * found[14.0].granularity
    width = np.cbrt(64 * found[14.0].params / 12)
    factor = 6 + 14 * found[14.0].experts / (12 * width)
    assert found[14.0].params * found[14.0].tokens * factor == pytest.approx(FLOPS, rel=1e-3)


def test_memory_limits_the_experts():
    form = form_of(("total",))
    values = CHINCHILLA._asdict() | {"T": 30.0, "gamma": 0.25}
    limited = Candidates(experts=(2, 8, 32), max_total=2e10)
    best = best_expert_model(form, theta(form, **values), FLOPS, 6.0, limited, 0.95)
    assert best.total <= 2e10
    with pytest.raises(UserError, match="No candidate fits"):
        best_expert_model(form, theta(form, **values), FLOPS, 6.0, Candidates(experts=(2,), max_total=10.0), 0.95)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"experts": ()}, "at least one number of experts"),
        ({"experts": (4, 8), "top_k": 5}, "top_k must be from 1 to the fewest experts"),
        ({"experts": (4,), "granularities": (0.0,)}, "Granularities must be above 0"),
        ({"experts": (4,), "expert_share": 1.5}, "expert_share must be"),
        ({"experts": (4,), "router_flops": -1.0}, "router_flops must be"),
        ({"experts": (4,), "aspect": 0.0}, "aspect must be"),
    ],
)
def test_candidates_that_make_no_sense(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        Candidates(**settings).check()


def test_candidates_and_laws_must_fit(law):
    with pytest.raises(UserError, match="no terms for experts"):
        law.optimum(FLOPS, Candidates(experts=(4,)))
    with pytest.raises(UserError, match="flops must be above 0"):
        law.optimum(0.0)
