import math
from dataclasses import replace

import pytest
import torch

from equipoise.contracts import Scores
from equipoise.errors import UserError
from equipoise.routing.selective_sinkhorn import SelectiveSinkhorn
from equipoise.routing.top_k import TopK
from hand_made import call_of, check_order, dense


def scored(logit_TE):
    prob_TE = logit_TE.softmax(-1)
    return Scores(logit_TE, prob_TE, prob_TE, prob_TE)


def at(call, step):
    return replace(call, step=torch.tensor(step))


@pytest.mark.parametrize(
    ("cost", "plan"),
    [
        ([[0.73, 0.27], [0.27, 0.73]], [[0.7150, 0.2850], [0.2850, 0.7150]]),
        ([[0.95, 0.05], [0.90, 0.10]], [[0.5250, 0.4750], [0.4750, 0.5250]]),
    ],
)
@pytest.mark.parametrize("kind", ["softmax", "logits"])
def test_golden_plans(cost, plan, kind):
    """The costs are softmax scores, given as such or as the logits themselves."""
    cost_TE = torch.tensor(cost).double()
    logit_TE = cost_TE.log() if kind == "softmax" else cost_TE
    selector = SelectiveSinkhorn(2, xi=0.5, tolerance=0.0, max_iterations=200, cost=kind)
    plan_TE = selector.plan(call_of(logit_TE, 1), scored(logit_TE))
    torch.testing.assert_close(plan_TE, torch.tensor(plan).double(), rtol=0, atol=5e-5)


def test_sums_are_kept_to_the_tolerance():
    logit_TE = torch.randn(101, 7).double() + torch.randn(7)
    selector = SelectiveSinkhorn(7, tolerance=1e-3, max_iterations=1000)
    plan_TE = selector.plan(call_of(logit_TE, 2), scored(logit_TE))
    torch.testing.assert_close(plan_TE.sum(1), torch.ones(101).double())
    miss = (plan_TE.sum(0) - 101 / 7).norm()
    assert 1e-6 < miss < 1e-3


def test_shifts_of_the_cost_change_no_plan():
    logit_TE = torch.randn(23, 5).double()
    selector = SelectiveSinkhorn(5, xi=0.5, tolerance=0.0, max_iterations=300, cost="logits")
    plans = [
        selector.plan(call_of(shifted_TE, 2), scored(shifted_TE))
        for shifted_TE in (logit_TE, logit_TE + 7, logit_TE + torch.randn(23, 1), logit_TE + torch.randn(5))
    ]
    for plan_TE in plans[1:]:
        torch.testing.assert_close(plan_TE, plans[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_experts_and_weights_are_read_from_the_plan(k):
    logit_TE = torch.randn(23, 5).double()
    mask_T = torch.arange(23) % 3 > 0
    selector, call, scores = SelectiveSinkhorn(5, probability=1.0), call_of(logit_TE, k, mask_T), scored(logit_TE)
    routing = selector(call, scores)
    check_order(routing)
    weight_TE, chosen_TE = dense(routing, 23)
    plan_TE = selector.plan(call, scores)
    expected_TE = torch.zeros(23, 5, dtype=torch.bool).scatter(1, plan_TE.topk(k).indices, True) & mask_T[:, None]
    assert torch.equal(chosen_TE, expected_TE)
    kept_TE = plan_TE * expected_TE
    if k > 1:
        kept_TE = (kept_TE / kept_TE.sum(1, keepdim=True)).nan_to_num(0)
    torch.testing.assert_close(weight_TE, kept_TE)


@pytest.mark.parametrize(("num_experts", "k"), [(16, 2), (64, 8)])
@pytest.mark.parametrize("std", [1, 2, 3])
def test_plan_steps_are_far_more_even_than_plain_ones_however_peaked_the_softmax(num_experts, k, std):
    logit_TE = std * torch.randn(1024, num_experts, generator=torch.Generator().manual_seed(0))
    logit_TE = logit_TE + torch.randn(num_experts, generator=torch.Generator().manual_seed(1))
    call, scores = call_of(logit_TE, k), scored(logit_TE)
    plan_E = SelectiveSinkhorn(num_experts, probability=1.0)(call, scores).load_E.double()
    plain_E = TopK(num_experts)(call, scores).load_E.double()
    assert (plan_E.max() / plan_E.mean() - 1) < (plain_E.max() / plain_E.mean() - 1) / 3


def test_a_plan_of_small_xi_balances_skewed_logits_after_some_iterations():
    logit_TE = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    logit_TE = logit_TE + torch.randn(16, generator=torch.Generator().manual_seed(1))
    call, scores = call_of(logit_TE, 2), scored(logit_TE)

    def max_over_mean(selector):
        load_E = selector(call, scores).load_E.double()
        return load_E.max() / load_E.mean()

    plain, one, many = (
        max_over_mean(selector)
        for selector in (
            TopK(16),
            SelectiveSinkhorn(16, probability=1.0, xi=0.05, cost="softmax", max_iterations=1),
            SelectiveSinkhorn(16, probability=1.0, xi=0.05, cost="softmax"),
        )
    )
    assert many < 1.5
    assert min(plain, one) > 4


@pytest.mark.parametrize(("probability", "training"), [(0.0, True), (1.0, False)])
def test_without_a_plan_it_is_top_k(probability, training):
    logit_TE = torch.randn(23, 5)
    call, scores = call_of(logit_TE, 2, training=training), scored(logit_TE)
    routing, plain = SelectiveSinkhorn(5, probability=probability)(call, scores), TopK(5)(call, scores)
    assert torch.equal(routing.expert_N, plain.expert_N)
    assert torch.equal(routing.weight_N, plain.weight_N)


def test_the_coin_is_the_steps_and_the_layers_and_falls_as_often_as_asked():
    logit_TE = torch.randn(5, 3)
    call, scores = call_of(logit_TE, 1), scored(logit_TE)
    plain, drawn = TopK(3)(call, scores).weight_N, []
    for seed in range(2):
        torch.manual_seed(seed)
        selector = SelectiveSinkhorn(3, probability=0.3)
        drawn.append([not torch.equal(selector(at(call, step), scores).weight_N, plain) for step in range(100)])
        again = [not torch.equal(selector(at(call, step), scores).weight_N, plain) for step in range(20)]
        assert again == drawn[-1][:20]
        assert 18 < sum(drawn[-1]) < 42
    assert drawn[0] != drawn[1]


def test_the_gradient_goes_through_the_plan_only_when_asked():
    """Detached, it is zero and not none: wrappers wait for every parameter's gradient."""
    logit_TE = torch.randn(5, 3).double().requires_grad_()
    mask_T = torch.tensor([True, True, False, True, True])
    settings = {"probability": 1.0, "tolerance": 0.0, "max_iterations": 7}

    def weights(logit_TE, grad="unroll"):
        selector = SelectiveSinkhorn(3, grad=grad, **settings)
        return selector(call_of(logit_TE, 2, mask_T), scored(logit_TE)).weight_N

    assert torch.autograd.gradcheck(weights, logit_TE)
    assert torch.autograd.grad(weights(logit_TE).square().sum(), logit_TE)[0].abs().max() > 1e-3
    assert torch.autograd.grad(weights(logit_TE, "detach").square().sum(), logit_TE)[0].eq(0).all()


@pytest.mark.parametrize(("noise_on", "moves_plan", "moves_plain"), [("cost", 1, 0), ("softmax", 0, 1), ("none", 0, 0)])
def test_noise_is_keyed_and_goes_where_it_is_told_to(noise_on, moves_plan, moves_plain):
    logit_TE = torch.randn(23, 5)
    call, scores = call_of(logit_TE, 2), scored(logit_TE)
    for probability, moves in ((1.0, moves_plan), (0.0, moves_plain)):
        quiet = SelectiveSinkhorn(5, probability=probability)
        noisy = SelectiveSinkhorn(5, probability=probability, noise_on=noise_on, noise_scale=1.0)
        weight_N = noisy(call, scores).weight_N
        assert torch.equal(noisy(call, scores).weight_N, weight_N)
        assert torch.equal(weight_N, quiet(call, scores).weight_N) != moves
        assert torch.equal(noisy(at(call, 1), scores).weight_N, weight_N) != moves


@pytest.mark.parametrize(
    "settings",
    [
        {"probability": 1.5},
        {"xi": 0.0},
        {"xi": 1e-300},
        {"tolerance": -1.0},
        {"tolerance": math.inf},
        {"max_iterations": 0},
        {"cost": "probabilities"},
        {"noise_on": "logits"},
        {"noise_scale": -1.0},
        {"grad": "straight"},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=f"selective_sinkhorn.{next(iter(settings))}="):
        SelectiveSinkhorn(5, **settings)


def test_a_graph_holds_one_step_and_not_the_loop():
    """Unrolled, the loop takes a compiler a minute."""

    def nodes(count):
        def weights(logit_TE):
            selector = SelectiveSinkhorn(5, probability=1.0, max_iterations=count)
            return selector(call_of(logit_TE, 2), scored(logit_TE)).weight_N

        graph = torch.fx.experimental.proxy_tensor.make_fx(weights, tracing_mode="fake")(torch.rand(23, 5))
        return len(graph.graph.nodes)

    assert nodes(40) == nodes(2)
