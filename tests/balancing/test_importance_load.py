import math
from dataclasses import replace

import pytest
import torch

from equipoise import UserError
from equipoise.balancing.importance_load import ImportanceLoad, chances, squared_variation
from equipoise.routing.noisy import Noisy, NoisyRouter
from equipoise.routing.top_k import TopK
from hand_made import call_of


def parts(tokens=11, k=2, mask_T=None, seed=0):
    """A call of a noisy router, its scores and its routing."""
    generator = torch.Generator().manual_seed(seed)
    router = NoisyRouter(7, 5).double()
    with torch.no_grad():
        for weight in router.parameters():
            weight.copy_(torch.randn(5, 7, generator=generator, dtype=torch.float64))
    x_TD = torch.randn(tokens, 7, generator=generator, dtype=torch.float64)
    call = replace(call_of(torch.zeros(tokens, 5).double(), k, mask_T), x_TD=x_TD, router=router)
    torch.manual_seed(4)
    scores = Noisy(5)(call)
    return call, scores, TopK(5)(call, scores)


def by_loop(call, scores, rows, load):
    """The paper's two sums, token by token and expert by expert."""
    num_experts = scores.logit_TE.shape[1]
    importance, loads = [0.0] * num_experts, [0.0] * num_experts
    for clean, noisy, x in zip(scores.logit_TE.tolist(), scores.choice_TE.tolist(), call.x_TD):
        kept = sorted(range(num_experts), key=lambda e, noisy=noisy: -noisy[e])[: call.k]
        total = sum(math.exp(noisy[e]) for e in kept)
        for e in kept:
            importance[e] += math.exp(noisy[e]) / total
        for e in range(num_experts):
            others = sorted((noisy[j] for j in range(num_experts) if j != e), reverse=True)
            scale = math.log(1 + math.exp(float(call.router.noise[e].detach() @ x)))
            loads[e] += 0.5 * (1 + math.erf((clean[e] - others[call.k - 1]) / scale / math.sqrt(2)))
    return variation(importance) + load * variation(loads)


def variation(values):
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


@pytest.mark.parametrize(("k", "load"), [(2, 1.0), (4, 0.5), (3, 0.0)])
def test_it_is_the_papers_two_sums(k, load):
    call, scores, routing = parts(k=k)
    loss = ImportanceLoad(5, load=load).loss(call, scores, routing)
    assert loss.item() == pytest.approx(by_loop(call, scores, routing, load), rel=1e-9)


def test_published_weights_are_a_tenth_each():
    balancer = ImportanceLoad(5)
    assert (balancer.weight, balancer.weight * balancer.load) == (0.1, 0.1)


def test_even_values_read_zero_and_collapse_reads_experts_minus_one():
    assert squared_variation(torch.full((5,), 3.0)) == 0
    assert squared_variation(torch.tensor([0.0, 0, 7, 0, 0])).item() == pytest.approx(4)
    assert squared_variation(torch.zeros(5)) == 0


def test_chances_are_those_of_drawing_one_noise_again():
    """By simulation: draw the noise of one expert many times, keep the others', and count how often it is chosen."""
    call, scores, _ = parts(tokens=3)
    scale_TE = call.router.noise_scale(call.x_TD)
    expected_TE = chances(scores.logit_TE, scores.choice_TE, scale_TE, 2)
    draws = 40_000
    for expert in range(5):
        noisy = scores.choice_TE.expand(draws, -1, -1).clone()
        noisy[:, :, expert] = scores.logit_TE[:, expert] + scale_TE[:, expert] * torch.randn(draws, 3).double()
        share_T = (noisy.topk(2, dim=-1).indices == expert).any(-1).double().mean(0)
        torch.testing.assert_close(share_T, expected_TE[:, expert], rtol=0, atol=0.01)


def test_its_gradient_agrees_with_finite_differences():
    """Of importance through the gates, of load through logits, noise and thresholds."""
    call, scores, _ = parts(tokens=4)
    drawn_TE = (scores.choice_TE - scores.logit_TE).detach() / call.router.noise_scale(call.x_TD).detach()

    def loss(weight, noise):
        clean_TE, scale_TE = call.x_TD @ weight.T, torch.nn.functional.softplus(call.x_TD @ noise.T)
        noisy_TE = clean_TE + drawn_TE * scale_TE
        return squared_variation(chances(clean_TE, noisy_TE, scale_TE, 2).mean(0))

    weights = [weight.detach().clone().requires_grad_() for weight in (call.router.weight, call.router.noise)]
    assert torch.autograd.gradcheck(loss, weights)
    ImportanceLoad(5).loss(*parts(tokens=4)).backward()


def test_the_whole_losss_gradient_agrees_with_finite_differences():
    call, _, _ = parts(tokens=4)

    def value():
        torch.manual_seed(4)
        scores = Noisy(5)(call)
        return ImportanceLoad(5).loss(call, scores, TopK(5)(call, scores))

    value().backward()
    for weight in (call.router.weight, call.router.noise):
        for index in [(0, 0), (2, 3), (4, 6)]:
            slope = 0
            for sign in (1, -1):
                with torch.no_grad():
                    weight[index] += sign * 1e-6
                    slope += sign * value().item() / 2e-6
                    weight[index] -= sign * 1e-6
            assert weight.grad[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_padding_does_not_count():
    mask_T = torch.arange(11) % 3 > 0
    call, scores, routing = parts(mask_T=mask_T)
    torch.manual_seed(4)
    dropped = replace(call, x_TD=call.x_TD[mask_T], sequence_T=call.sequence_T[mask_T], mask_T=None)
    alone = Noisy(5)(dropped)
    loss = ImportanceLoad(5)
    expected = loss.loss(dropped, alone, TopK(5)(dropped, alone))
    torch.testing.assert_close(loss.loss(call, scores, routing), expected, rtol=1e-12, atol=0)
    for nothing in (parts(mask_T=torch.zeros(11, dtype=torch.bool)), parts(tokens=0)):
        assert loss.loss(*nothing) == 0


def test_with_all_experts_chosen_only_importance_is_left():
    call, scores, routing = parts(k=5)
    loss = ImportanceLoad(5).loss(call, scores, routing)
    torch.testing.assert_close(loss, squared_variation(scores.gate_TE.mean(0)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("settings", [{"load": -1.0}, {"weight": -1.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        ImportanceLoad(5, **settings)
