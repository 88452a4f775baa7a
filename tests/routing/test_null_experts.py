from dataclasses import replace

import pytest
import torch

from equipoise import MoE, UserError
from equipoise.routing.null_experts import NullExperts
from equipoise.routing.top_k import TopK
from hand_made import awkward_logits, call_of, check_order, dense, scores_of

TRUE = 3


def routed(score_TE, k, true=TRUE, mask_T=None, **settings):
    call = replace(call_of(score_TE, k, mask_T), num_experts=true)
    return NullExperts(true, nulls=score_TE.shape[1] - true, **settings)(call, scores_of(score_TE))


def by_loop(score_TE, k, true, shared_by_all=False):
    """Token by token: the K best of all, weights shared among the true ones (0/0 is 0), or among all."""
    weight_TE = torch.zeros_like(score_TE)
    for t, row in enumerate(score_TE):
        chosen = row.topk(k).indices.tolist()
        paid = chosen if shared_by_all else [e for e in chosen if e < true]
        for e in paid:
            weight_TE[t, e] = row[e] / sum(row[j] for j in paid)
    return weight_TE


@pytest.mark.parametrize("kind", ["zero", "identity"])
@pytest.mark.parametrize(("k", "nulls"), [(2, 4), (3, 1), (3, 5)])
def test_gates_are_the_papers(kind, k, nulls):
    for name, logit_TE in awkward_logits(TRUE + nulls).items():
        score_TE = logit_TE.double().softmax(1)
        routing = routed(score_TE, k, kind=kind)
        check_order(routing)
        weight_TE, chosen_TE = dense(routing, len(score_TE))
        assert chosen_TE.sum(1).eq(k).all(), name
        if name in ("all_equal", "ties", "two_levels", "large"):
            continue  # the choice among equals is free
        expected_TE = by_loop(score_TE, k, TRUE, kind == "identity")
        tiny_T = (score_TE * chosen_TE)[:, :TRUE].sum(1) < 1e-30
        torch.testing.assert_close(weight_TE[~tiny_T], expected_TE[~tiny_T], rtol=1e-9, atol=1e-15)


def test_gates_over_true_picks_sum_to_one_or_zero():
    score_TE = torch.rand(50, 9, dtype=torch.float64).softmax(1)
    weight_TE, chosen_TE = dense(routed(score_TE, 2), 50)
    has_true_T = chosen_TE[:, :TRUE].any(1)
    assert 0 < has_true_T.sum() < 50
    torch.testing.assert_close(weight_TE.sum(1), has_true_T.double())
    assert not weight_TE[:, TRUE:].any()


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("kind", ["zero", "identity"])
def test_without_nulls_it_is_top_k(k, kind):
    score_TE = torch.rand(17, 5).softmax(1)
    ours, theirs = routed(score_TE, k, true=5, kind=kind), TopK(5)(call_of(score_TE, k), scores_of(score_TE))
    for name in ("token_N", "expert_N", "weight_N", "load_E"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_there_are_as_many_nulls_as_experts_by_default():
    assert NullExperts(5).nulls == 5
    layer = MoE(dim=7, hidden_dim=3, num_experts=5, top_k=2, method="adamoe")
    assert layer.router.weight.shape == (10, 7)
    assert len(layer.experts.gate_up) == layer.num_experts == 5


def test_even_loads_give_true_experts_the_planned_rows():
    assert NullExperts(8, nulls=8).planned_rows(8, 3) == 1.5
    assert NullExperts(8, nulls=0).planned_rows(8, 3) == 3
    score_TE = torch.eye(9).repeat(1, 1) + torch.eye(9).roll(1, 1)
    assert routed(score_TE, 2).load_E[:TRUE].sum() / 9 == NullExperts(TRUE, nulls=6).planned_rows(TRUE, 2)


def test_a_token_with_nulls_alone_is_answered_with_nothing_or_with_itself():
    for kind, weights in (("zero", 0.0), ("identity", 1.0)):
        torch.manual_seed(1)
        layer = MoE(dim=7, hidden_dim=3, num_experts=3, top_k=2, method="adamoe", kind=kind).double()
        with torch.no_grad():
            layer.router.weight.zero_()[3:, 0] = 90.0
        x = torch.randn(5, 7, dtype=torch.float64).abs()
        torch.testing.assert_close(layer(x), weights * x, rtol=1e-12, atol=1e-12)


def test_identity_nulls_answer_by_their_weight_and_teach_the_router():
    """Against a loop over tokens, gradients of the router included."""
    torch.manual_seed(1)
    layer = MoE(dim=7, hidden_dim=3, num_experts=3, top_k=2, method="adamoe", kind="identity", kernel="loop").double()
    layer.eval()
    x = torch.randn(13, 7, dtype=torch.float64)
    (ours,) = torch.autograd.grad(layer(x).square().sum(), layer.router.weight)
    weight = layer.router.weight.detach().clone().requires_grad_()
    total = 0
    for token in x:
        prob = (weight @ token).softmax(0)
        chosen = prob.topk(2).indices
        answer = 0
        for e in chosen.tolist():
            gate, up = (layer.experts.gate_up[e] @ token).chunk(2) if e < 3 else (None, None)
            y = token if gate is None else layer.experts.down[e] @ (torch.nn.functional.silu(gate) * up)
            answer = answer + prob[e] / prob[chosen].sum() * y
        total = total + answer.square().sum()
    (expected,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["zero", "identity"])
def test_autocast_gives_the_type_that_experts_give(kind):
    layer = MoE(dim=7, hidden_dim=3, num_experts=3, top_k=2, method="adamoe", kind=kind)
    x = torch.randn(13, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


def test_padding_takes_no_null():
    score_TE, mask_T = torch.rand(17, 9).softmax(1), torch.arange(17) % 3 > 0
    masked, alone = routed(score_TE, 2, mask_T=mask_T), routed(score_TE[mask_T], 2)
    assert masked.load_E.tolist() == alone.load_E.tolist()
    assert masked.load_E.sum() == 2 * mask_T.sum()


@pytest.mark.parametrize("settings", [{"nulls": -1}, {"kind": "copy"}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        NullExperts(5, **settings)
