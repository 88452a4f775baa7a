import math

import pytest
import torch

from equipoise import METHODS, MoE
from equipoise.balancing.z_loss import ZLoss
from equipoise.routing.top_k import TopK
from hand_made import attach_still, call_of, scores_of

SIZES = {"dim": 7, "hidden_dim": 5, "num_experts": 5, "top_k": 2, "kernel": "loop"}


def value_of(logit_TE, mask_T=None):
    call, scores = call_of(logit_TE, 1, mask_T), scores_of(logit_TE)
    return ZLoss(logit_TE.shape[1]).loss(call, scores, TopK(logit_TE.shape[1])(call, scores)).item()


@pytest.mark.parametrize("num_experts", [2, 5, 64])
@pytest.mark.parametrize("level", [0.0, 3.0, -80.0, 80.0])
def test_equal_logits(num_experts, level):
    assert value_of(torch.full((3, num_experts), level)) == pytest.approx((level + math.log(num_experts)) ** 2)


def test_random_logits():
    logit_TE = torch.randn(11, 5, dtype=torch.float64) * 3
    squares = [math.log(math.fsum(map(math.exp, row))) ** 2 for row in logit_TE.tolist()]
    assert value_of(logit_TE) == pytest.approx(math.fsum(squares) / 11, rel=1e-12)


def test_padding_does_not_count():
    logit_TE, mask_T = torch.randn(11, 5), torch.arange(11) % 3 > 0
    assert value_of(logit_TE, mask_T) == pytest.approx(value_of(logit_TE[mask_T]))
    assert value_of(logit_TE, torch.zeros(11, dtype=torch.bool)) == 0


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.causal and row.scorer != "centroid"])
def test_it_composes_with_every_method_and_its_gradient_is_exact(method):
    def gradient(z_loss):
        torch.manual_seed(1)
        layer = MoE(**SIZES, method=method, z_loss=z_loss).double()
        handle, _ = attach_still(layer)
        handle.follow(0 * layer(x).sum()).backward()
        return layer.router.weight

    x, weight = torch.randn(13, 7, dtype=torch.float64), 0.3
    with_loss, without = gradient(weight), gradient(0.0)
    router = without.detach().clone().requires_grad_()
    (weight * (x @ router.T).logsumexp(-1).square().mean()).backward()
    torch.testing.assert_close(with_loss.grad - without.grad, router.grad, rtol=1e-9, atol=1e-12)


def test_gradient_agrees_with_finite_differences_of_the_recorded_value():
    layer = MoE(**SIZES, method="unbalanced", z_loss=1.0).double()
    handle, _ = attach_still(layer)
    x = torch.randn(13, 7, dtype=torch.float64)
    handle.follow(0 * layer(x).sum()).backward()
    gradient, weight, step = layer.router.weight.grad.clone(), layer.router.weight.detach().clone(), 1e-6

    def value(weight):
        handle.discard()
        with torch.no_grad():
            layer.router.weight.copy_(weight)
        layer(x).sum().backward()
        return (layer.window.sums["loss.z_loss"] / layer.window.sums["tokens"]).item()

    for index in [(0, 0), (2, 3), (4, 6)]:
        bump = torch.zeros_like(weight)
        bump[index] = step
        slope = (value(weight + bump) - value(weight - bump)) / (2 * step)
        assert gradient[index].item() == pytest.approx(slope, rel=1e-6)


def test_a_weight_of_zero_leaves_it_out():
    assert list(MoE(**SIZES, method="unbalanced").balancers) == []
    assert list(MoE(**SIZES, method="unbalanced", z_loss=1e-3).balancers) == ["z_loss"]


@pytest.mark.parametrize("bias", [80.0, -80.0])
def test_large_logits_stay_finite(bias):
    logit_TE = torch.randn(3, 5, requires_grad=True)
    shifted_TE = logit_TE + bias
    call, scores = call_of(shifted_TE.detach(), 1), scores_of(shifted_TE)
    ZLoss(5).loss(call, scores, TopK(5)(call, scores)).backward()
    expected = 2 * shifted_TE.logsumexp(1, keepdim=True) * shifted_TE.softmax(1) / 3
    torch.testing.assert_close(logit_TE.grad, expected.detach(), rtol=1e-5, atol=1e-6)
