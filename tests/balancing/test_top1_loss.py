import pytest
import torch

from equipoise import UserError
from equipoise.balancing.balance_loss import BalanceLoss
from equipoise.balancing.top1_loss import Top1Loss
from equipoise.routing.top_k import TopK
from hand_made import call_of, routing_of, scores_of


def value_of(logit_TE, k=1, mask_T=None, tau=1.0):
    loss = Top1Loss(logit_TE.shape[1], tau=tau)
    return loss.loss(call_of(logit_TE, k, mask_T), scores_of(logit_TE), routing_of([0] * logit_TE.shape[1]))


def by_loop(logit_TE, k, tau):
    prob = [[2.718281828459045 ** (z / tau) for z in row] for row in logit_TE.tolist()]
    prob = [[p / sum(row) for p in row] for row in prob]
    count, tokens = len(prob[0]), len(prob)
    mean = [sum(row[e] for row in prob) / tokens for e in range(count)]
    confidence = sum(sum(sorted(row)[-k:]) for row in prob) / tokens
    return count * sum(p * p for p in mean) / confidence


@pytest.mark.parametrize(("k", "tau"), [(1, 1.0), (2, 0.5), (5, 0.1)])
def test_it_is_the_pages_formula(k, tau):
    logit_TE = torch.randn(11, 5, dtype=torch.float64)
    assert value_of(logit_TE, k, tau=tau).item() == pytest.approx(by_loop(logit_TE, k, tau), rel=1e-9)


@pytest.mark.parametrize("num_experts", [2, 5, 96])
def test_the_extremes_at_one_expert_per_token(num_experts):
    flat = torch.zeros(num_experts, num_experts)
    same = flat.index_fill(1, torch.tensor([1]), 80.0)
    assert value_of(flat).item() == pytest.approx(num_experts)
    assert value_of(same).item() == pytest.approx(num_experts)
    assert value_of(80 * torch.eye(num_experts)).item() == pytest.approx(1)


def test_the_extremes_at_several():
    """Even loads of tokens that share their probability among K read 1; flat probabilities E/K."""
    sure = 80.0 * torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]])
    assert value_of(sure, k=2).item() == pytest.approx(1)
    assert value_of(torch.zeros(3, 4), k=2).item() == pytest.approx(2)


def test_random_logits_of_sixteen_experts_at_a_low_temperature():
    """The specification's figure."""
    logit_TE = torch.randn(50_000, 16, generator=torch.Generator().manual_seed(0))
    assert value_of(logit_TE, tau=0.1).item() == pytest.approx(1.14, abs=0.01)


def test_the_balance_loss_is_pleased_by_flat_probabilities_and_this_one_is_not():
    """Sigma-MoE-Tiny's layer 0: loads of 2.8 times their share and more, a balance loss of at most 1.01."""
    generator = torch.Generator().manual_seed(0)
    offset_E = 0.35 * torch.randn(96, generator=generator).double()
    logit_TE = 0.02 * (torch.randn(20_000, 96, generator=generator) + offset_E).double()
    call, scores = call_of(logit_TE, 1), scores_of(logit_TE.softmax(1))
    routing = TopK(96)(call, scores)
    assert routing.load_E.max() * 96 / 20_000 >= 2.8
    balance = BalanceLoss(96, scope="micro").loss(call, scores, routing)
    assert 1 < balance.item() <= 1.01
    assert value_of(logit_TE).item() > 50
    sharp_TE = 80 * torch.nn.functional.one_hot(torch.arange(96 * 7) % 96, 96).double()
    assert value_of(sharp_TE).item() == pytest.approx(1)


def test_its_gradient_agrees_with_finite_differences():
    logit_TE = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    call = call_of(logit_TE.detach(), 2, torch.tensor([True, False, True, True, True]))
    loss, routing = Top1Loss(4, tau=0.7), routing_of([0] * 4)
    assert torch.autograd.gradcheck(lambda z: loss.loss(call, scores_of(z), routing), logit_TE)


def test_padding_does_not_count():
    logit_TE, mask_T = torch.randn(11, 5), torch.arange(11) % 3 > 0
    assert value_of(logit_TE, mask_T=mask_T).item() == pytest.approx(value_of(logit_TE[mask_T]).item())
    assert value_of(logit_TE, mask_T=torch.zeros(11, dtype=torch.bool)) == 0
    assert value_of(logit_TE[:0]) == 0


@pytest.mark.parametrize("settings", [{"tau": 0.0}, {"weight": -1.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Top1Loss(5, **settings)
