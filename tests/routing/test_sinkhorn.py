import math

import pytest
import torch

from equipoise.contracts import Scores
from equipoise.errors import UserError
from equipoise.routing.sinkhorn import Sinkhorn
from equipoise.routing.top_k import TopK
from hand_made import awkward_logits, call_of, check_order, dense, dense_of


def scored(logit_TE):
    prob_TE = logit_TE.softmax(-1)
    return Scores(logit_TE, prob_TE, prob_TE, prob_TE)


def plan_by_scaling(logit_TE, tolerance):
    """Megatron's loop as published, without its 1e-8: alternate scalings of exp(logit), from ones."""
    cost_TE, error = logit_TE.exp(), 1e9
    d1_E = torch.ones(logit_TE.shape[1], dtype=logit_TE.dtype)
    while error > tolerance:
        d0_T = 1 / (len(cost_TE) * (cost_TE * d1_E).sum(1))
        before_E, d1_E = d1_E, 1 / (cost_TE.shape[1] * (cost_TE * d0_T[:, None]).sum(0))
        error = (before_E - d1_E).abs().mean()
    return d0_T[:, None] * cost_TE * d1_E


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-2])
def test_experts_and_weights_are_those_of_the_published_loop(k, tolerance):
    for seed in range(7):
        logit_TE = torch.randn(41, 5, generator=torch.Generator().manual_seed(seed)).double()
        logit_TE = logit_TE + torch.randn(5, generator=torch.Generator().manual_seed(seed + 100))
        routing = Sinkhorn(5, tolerance=tolerance)(call_of(logit_TE, k), scored(logit_TE))
        check_order(routing)
        expert_TK = plan_by_scaling(logit_TE, tolerance).topk(k).indices
        gate_TE = logit_TE.sigmoid() if k == 1 else logit_TE.softmax(1)
        for actual, expected in zip(dense(routing, 41), dense_of(gate_TE.gather(1, expert_TK), expert_TK, 5)):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", awkward_logits(5))
def test_no_logits_overflow(name):
    logit_TE = awkward_logits(5)[name]
    routing = Sinkhorn(5, max_iterations=20)(call_of(logit_TE, 2), scored(logit_TE))
    check_order(routing)
    assert routing.weight_N.isfinite().all()
    assert routing.load_E.sum() == 2 * len(logit_TE)


def test_loads_of_training_are_nearly_even():
    logit_TE = torch.randn(4096, 16) + 2 * torch.randn(16)
    call, scores = call_of(logit_TE, 2), scored(logit_TE)
    even, plain = Sinkhorn(16)(call, scores).load_E, TopK(16)(call, scores).load_E
    assert plain.max() > 2 * 512
    assert even.max() < 1.2 * 512


def test_padding_moves_no_price():
    logit_TE, mask_T = torch.randn(41, 5).double(), torch.arange(41) % 3 > 0
    padded_TE = torch.where(mask_T[:, None], logit_TE, torch.tensor([30.0, 0, 0, 0, 0]).double())
    padded = dense(Sinkhorn(5)(call_of(padded_TE, 2, mask_T), scored(padded_TE)), 41)
    alone = dense(Sinkhorn(5)(call_of(logit_TE[mask_T], 2), scored(logit_TE[mask_T])), int(mask_T.sum()))
    for actual, expected in zip(padded, alone):
        torch.testing.assert_close(actual[mask_T], expected)
        assert not actual[~mask_T].any()


@pytest.mark.parametrize("k", [1, 2])
def test_evaluation_is_plain_top_k_with_the_same_gates(k):
    logit_TE = torch.randn(41, 5)
    routing = Sinkhorn(5)(call_of(logit_TE, k, training=False), scored(logit_TE))
    gate_TE, expert_TK = logit_TE.sigmoid() if k == 1 else logit_TE.softmax(1), logit_TE.topk(k).indices
    for actual, expected in zip(dense(routing, 41), dense_of(gate_TE.gather(1, expert_TK), expert_TK, 5)):
        torch.testing.assert_close(actual, expected)


def test_the_loop_is_bounded_and_the_plan_has_no_gradient():
    logit_TE = (torch.randn(41, 5).double() * 10).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        routing = Sinkhorn(5, tolerance=0.0, max_iterations=3)(call_of(logit_TE, 2), scored(logit_TE))
        (gradient_TE,) = torch.autograd.grad(routing.weight_N.sum(), logit_TE)
    (expected_TE,) = torch.autograd.grad((logit_TE.softmax(1) * dense(routing, 41)[1]).sum(), logit_TE)
    torch.testing.assert_close(gradient_TE, expected_TE)


@pytest.mark.parametrize("settings", [{"tolerance": -1.0}, {"tolerance": math.inf}, {"max_iterations": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=f"sinkhorn.{next(iter(settings))}="):
        Sinkhorn(5, **settings)


def test_a_graph_holds_one_step_and_not_the_loop():
    """Unrolled, the loop takes a compiler a minute."""

    def nodes(count):
        def weights(logit_TE):
            return Sinkhorn(5, max_iterations=count)(call_of(logit_TE, 2), scored(logit_TE)).weight_N

        graph = torch.fx.experimental.proxy_tensor.make_fx(weights, tracing_mode="fake")(torch.rand(23, 5))
        return len(graph.graph.nodes)

    assert nodes(40) == nodes(2)
