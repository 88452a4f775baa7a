from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from equipoise import MoE, attach
from equipoise.routing.noisy import Noisy, NoisyRouter
from equipoise.routing.top_k import TopK
from hand_made import call_of, dense

SIZES = {"dim": 7, "hidden_dim": 3, "num_experts": 5, "top_k": 2, "method": "importance_load"}


def scored(tokens=23, step=0, training=True, mask_T=None, seed=0, scale=0.0):
    """The scores of random tokens, and the call; ``scale`` sets the second matrix."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, 7, generator=generator, dtype=torch.float64)
    router = NoisyRouter(7, 5).double()
    with torch.no_grad():
        router.weight.copy_(torch.randn(5, 7, generator=generator, dtype=torch.float64))
        router.noise.copy_(scale * torch.randn(5, 7, generator=generator, dtype=torch.float64))
    call = call_of(torch.zeros(tokens, 5).double(), 2, mask_T, training)
    call = replace(call, x_TD=x_TD, router=router, step=torch.tensor(step))
    torch.manual_seed(3)
    return Noisy(5)(call), call


def test_choice_is_the_logit_and_scaled_normal_noise():
    """Standardised, what was added is a standard normal sample, and another one at the next step."""
    scores, call = scored(tokens=4000, scale=0.5)
    scale_TE = torch.nn.functional.softplus(call.x_TD @ call.router.noise.T)
    drawn_TE = (scores.choice_TE - call.x_TD @ call.router.weight.T) / scale_TE
    assert drawn_TE.mean().abs() < 0.02
    assert drawn_TE.std().item() == pytest.approx(1, abs=0.02)
    assert torch.corrcoef(drawn_TE.T).fill_diagonal_(0).abs().max() < 0.06
    assert torch.equal(scored(tokens=4000, scale=0.5)[0].choice_TE, scores.choice_TE)
    assert not torch.allclose(scored(tokens=4000, scale=0.5, step=1)[0].choice_TE, scores.choice_TE)


def test_the_noise_starts_at_the_papers_scale():
    """A second matrix of zeros: softplus(0) everywhere."""
    assert torch.equal(NoisyRouter(7, 5).noise_scale(torch.randn(3, 7)), torch.full((3, 5), 2.0).log())


def test_gates_are_the_softmax_of_the_kept_noisy_logits():
    scores, call = scored(scale=0.5)
    weight_TE, chosen_TE = dense(TopK(5)(call, scores), 23)
    kept_TE = scores.choice_TE.masked_fill(~chosen_TE, -torch.inf)
    assert chosen_TE.sum(1).eq(2).all()
    torch.testing.assert_close(weight_TE, kept_TE.softmax(1), rtol=1e-12, atol=0)
    assert not torch.equal(chosen_TE, torch.zeros_like(chosen_TE).scatter(1, scores.logit_TE.topk(2).indices, True))


def test_evaluation_is_without_noise():
    scores, call = scored(training=False, scale=0.5)
    assert torch.equal(scores.choice_TE, scores.logit_TE)
    assert torch.equal(scores.logit_TE, call.router(call.x_TD))
    assert torch.equal(scores.gate_TE, scores.prob_TE)


def test_losses_read_plain_logits():
    scores, call = scored(scale=0.5)
    assert torch.equal(scores.logit_TE, call.router(call.x_TD))
    assert torch.equal(scores.prob_TE, scores.logit_TE.softmax(1))


def test_padding_draws_nothing():
    """A real token's noise is that of its place among the real ones."""
    mask_T = torch.arange(23) % 3 > 0
    masked, call = scored(mask_T=mask_T)
    torch.manual_seed(3)
    alone = Noisy(5)(replace(call, x_TD=call.x_TD[mask_T], sequence_T=call.sequence_T[mask_T], mask_T=None))
    torch.testing.assert_close(masked.choice_TE[mask_T], alone.choice_TE, rtol=1e-12, atol=1e-12)


def test_recomputation_and_resumption_draw_alike():
    """The layer in training, noise on: a checkpoint, and a copy restored from the saved state, give the same."""
    torch.manual_seed(1)
    layer, copied = MoE(**SIZES).double(), MoE(**SIZES).double()
    copied.load_state_dict(layer.state_dict())
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    gradients = []
    for each, wrapped in ((layer, False), (copied, True)):
        handle = attach(each, ())
        y = checkpoint(each, x, use_reentrant=False) if wrapped else each(x)
        handle.follow(y.square().mean()).backward()
        gradients.append((y, each.router.weight.grad, each.router.noise.grad))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert gradients[0][2].abs().amax(1).min() > 1e-6, "the noise's scale should learn"
