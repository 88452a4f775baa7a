import math
import tracemalloc
from dataclasses import replace

import pytest
import torch
from scipy.integrate import quad
from scipy.special import gammaln
from scipy.stats import norm
from torch._subclasses import FakeTensorMode

from equipoise.routing.norm import Norm, _sampled, length_constant
from equipoise.routing.top_k import TopK
from hand_made import awkward_logits, call_of, dense

E, K = 11, 3
PUBLISHED = {(96, 1): 4.02, (192, 1): 5.16, (288, 1): 6.02, (384, 1): 6.73, (192, 2): 3.85}


def score(logit_TE, k=K, sigma=1.0):
    scorer = Norm(logit_TE.shape[1])
    torch.nn.init.constant_(scorer.sigma, sigma)
    return scorer(call_of(logit_TE, k))


@pytest.mark.parametrize(("sizes", "expected"), PUBLISHED.items())
def test_the_constant_is_the_published_one(sizes, expected):
    """The paper has two decimals of another sample; its 6.73 lies 0.009 from the exact mean."""
    assert length_constant(*sizes) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("num_experts", [96, 192, 288, 384])
def test_the_constant_is_the_mean_within_its_error(num_experts):
    """The exact mean for K = 1: of 1 / max over that of 1 / length, since length and direction are independent."""

    def inverse(largest):
        return num_experts * norm.pdf(largest) * norm.cdf(largest) ** (num_experts - 1) / largest

    mean, _ = quad(inverse, 1e-6, 10, points=[1, 2, 3, 4], limit=400)
    shorter = math.exp(gammaln((num_experts - 1) / 2) - gammaln(num_experts / 2)) / math.sqrt(2)
    assert length_constant(num_experts, 1) == pytest.approx(mean / shorter, abs=0.008)  # 3 to 4 standard errors


def test_no_mode_of_torch_sees_how_it_is_sampled():
    """Whoever exports a model first meets the constant there."""
    sizes = 97, 2
    with FakeTensorMode():
        first = length_constant(*sizes)
    _sampled.cache_clear()
    assert first == length_constant(*sizes)
    _sampled.cache_clear()
    call = call_of(torch.randn(3, 97), 2)
    module = Norm(97)
    module.forward = lambda logit_TE: Norm.forward(module, replace(call, x_TD=logit_TE)).gate_TE
    program = torch.export.export(module, (call.x_TD,), strict=False)
    assert torch.equal(program.module()(call.x_TD), module(call.x_TD))


def test_sampling_takes_little_memory():
    """All samples of 1024 experts would be 400 MB, several times over."""
    _sampled.cache_clear()
    tracemalloc.start()
    length_constant(1024, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize("k", [1, 2])
def test_the_constant_makes_gates_of_length_one_on_other_samples(k):
    logit_TE = torch.randn(20011, 96, generator=torch.Generator().manual_seed(3))
    length_T = score(logit_TE, k).gate_TE.topk(k).values.norm(dim=1)
    assert (1 / length_T).mean().item() == pytest.approx(1, rel=5e-3)


@pytest.mark.parametrize("num_experts", [1, 2, 3, 8])
def test_with_few_experts_it_is_finite(num_experts):
    """Half of all samples of one expert, and 1 in 256 of eight, have no positive entry."""
    assert 1 <= length_constant(num_experts, 1) < 10
    assert length_constant(1, 1) == 1


@pytest.mark.parametrize("name", awkward_logits(E))
@pytest.mark.parametrize("sigma", [1.0, 0.3])
def test_it_is_the_equation(name, sigma):
    logit_TE = awkward_logits(E)[name].double()
    scores, constant = score(logit_TE, sigma=sigma), sigma * length_constant(E, K)
    for row, gates, probs, choices in zip(logit_TE.tolist(), scores.gate_TE, scores.prob_TE, scores.choice_TE):
        length = math.sqrt(math.fsum(z * z for z in row)) + 1e-8
        expected = [constant * max(0, z / length) for z in row]
        assert gates.tolist() == pytest.approx(expected, rel=1e-6)
        total = math.fsum(expected)
        assert probs.tolist() == pytest.approx([s / total if total else 0 for s in expected], rel=1e-6)
        assert choices.tolist() == pytest.approx([z / length for z in row], rel=1e-6)


def test_the_length_of_logits_changes_nothing_and_half_of_the_scores_are_zero():
    logit_TE = torch.randn(1009, E, dtype=torch.float64)
    one, other = score(logit_TE), score(1000 * logit_TE)
    torch.testing.assert_close(other.gate_TE, one.gate_TE, rtol=1e-6, atol=0)
    assert (one.gate_TE == 0).double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_masked_expert_is_outside_the_norm_and_never_chosen_before_another():
    logit_TE = torch.randn(7, E, dtype=torch.float64)
    masked_TE, zeroed_TE = logit_TE.clone(), logit_TE.clone()
    masked_TE[:, 4], zeroed_TE[:, 4] = -torch.inf, 0.0
    call = replace(call_of(logit_TE, K), router=torch.nn.Identity())  # a product with -inf would be NaN
    masked, zeroed = (Norm(E)(replace(call, x_TD=logits)) for logits in (masked_TE, zeroed_TE))
    assert torch.equal(masked.gate_TE, zeroed.gate_TE)
    assert torch.equal(masked.prob_TE, zeroed.prob_TE)
    assert (masked.choice_TE[:, 4] == -torch.inf).all()
    assert masked.choice_TE.topk(E - 1).indices.ne(4).all()


def test_gates_are_not_made_to_sum_to_one_and_places_without_a_positive_logit_weigh_nothing():
    logit_TE = torch.tensor([[3.0, -1.0, 4.0, -2.0, -5.0]], dtype=torch.float64)
    call = call_of(logit_TE, 3)
    weight_TE, chosen_TE = dense(TopK(5, renormalize=False)(call, Norm(5)(call)), 1)
    constant = length_constant(5, 3) / math.sqrt(55)
    torch.testing.assert_close(weight_TE, torch.tensor([[3.0, 0, 4.0, 0, 0]]).double() * constant, rtol=1e-6, atol=0)
    assert chosen_TE.tolist() == [[True, True, True, False, False]]  # the third by its logit, not by its place


def test_gradient_agrees_with_finite_differences_and_is_finite_at_zero():
    logit_TE = torch.randn(7, E, dtype=torch.float64).requires_grad_()
    scorer = Norm(E).double()

    def gates(logit_TE, sigma):
        scorer.sigma = torch.nn.Parameter(sigma)
        return torch.func.functional_call(scorer, {"sigma": sigma}, (call_of(logit_TE, K),)).gate_TE

    assert torch.autograd.gradcheck(gates, (logit_TE, torch.full((1,), 0.7, dtype=torch.float64).requires_grad_()))
    zero_TE = torch.zeros(3, E, dtype=torch.float64).requires_grad_()
    score(zero_TE).gate_TE.sum().backward()
    assert zero_TE.grad.isfinite().all()
