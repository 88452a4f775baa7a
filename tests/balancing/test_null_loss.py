from dataclasses import replace

import pytest
import torch

from equipoise import MoE, UserError
from equipoise.balancing.balance_loss import BalanceLoss
from equipoise.balancing.null_loss import NullLoss
from hand_made import attach_still, call_of, routing_of, scores_of


def value_of(prob_TE, demand_E, true, scope="micro", balancer=NullLoss):
    call = replace(call_of(prob_TE, 1), num_experts=true)
    loss = balancer(len(demand_E), scope=scope)
    carrier = loss.loss(call, scores_of(prob_TE), routing_of(demand_E))
    return (loss.slope(carrier, torch.tensor(demand_E)) * carrier).sum()


def by_loop(prob_TE, demand_E, true):
    """(E+m) sum f~ P, with every null's f replaced by the nulls' mean."""
    share = [count / sum(demand_E) for count in demand_E]
    nulls = share[true:]
    share = share[:true] + [sum(nulls) / len(nulls)] * len(nulls) if nulls else share
    return len(share) * sum(f * p for f, p in zip(share, prob_TE.mean(0).tolist()))


@pytest.mark.parametrize("scope", ["micro", "global"])
@pytest.mark.parametrize(("true", "demand_E"), [(3, [7, 1, 2, 0, 9]), (1, [0, 3, 8, 1, 1]), (5, [3, 1, 4, 1, 5])])
def test_it_is_the_papers_formula(scope, true, demand_E):
    prob_TE = torch.rand(11, 5, dtype=torch.float64).softmax(1)
    expected = by_loop(prob_TE, demand_E, true)
    assert value_of(prob_TE, demand_E, true, scope).item() == pytest.approx(expected, rel=1e-12)


def test_balance_reads_one_however_nulls_share_their_rows():
    prob_TE = torch.rand(11, 6, dtype=torch.float64).softmax(1)
    for nulls in ([2, 2, 2], [6, 0, 0], [1, 5, 0]):
        assert value_of(prob_TE, [2, 2, 2, *nulls], 3).item() == pytest.approx(1)
    assert value_of(prob_TE, [2, 2, 2, 6, 0, 0], 3, balancer=BalanceLoss).item() != pytest.approx(1, abs=1e-3)


def test_without_nulls_it_is_the_balance_loss():
    prob_TE = torch.rand(11, 5).softmax(1)
    ours, theirs = (value_of(prob_TE, [3, 1, 4, 1, 5], 5, balancer=kind) for kind in (NullLoss, BalanceLoss))
    torch.testing.assert_close(ours, theirs)


def test_all_nulls_get_the_same_gradient():
    prob_TE = torch.rand(11, 5, dtype=torch.float64, requires_grad=True)
    value_of(prob_TE, [7, 1, 2, 0, 9], 3).backward()
    null_Tm = prob_TE.grad[:, 3:]
    assert null_Tm.eq(null_Tm[0, 0]).all()
    assert prob_TE.grad[0, 0] != prob_TE.grad[0, 1]


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_its_gradient_agrees_with_finite_differences(scope):
    prob_TE = torch.rand(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: value_of(p, [7, 1, 2, 0, 9, 3], 2, scope), prob_TE)


def test_permuting_null_experts_changes_neither_loss_nor_output():
    def after(order):
        torch.manual_seed(1)
        layer = MoE(dim=7, hidden_dim=3, num_experts=3, top_k=2, method="adamoe", nulls=4).double()
        with torch.no_grad():
            layer.router.weight.copy_(layer.router.weight[[0, 1, 2, *order]])
        handle, _ = attach_still(layer)
        y = layer(torch.randn(13, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
        handle.follow(y.square().mean()).backward()
        return y, layer.window.sums["loss.null_loss"], layer.router.weight.grad[:3]

    for ours, theirs in zip(after([5, 3, 6, 4]), after([3, 4, 5, 6])):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", [{"scope": "sequence"}, {"weight": -1.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=f"null_loss.{next(iter(settings))}"):
        NullLoss(5, **settings)
