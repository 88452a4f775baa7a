"""Padding is in no output, gradient, count, state, loss or capacity, whatever stands in it."""

import pytest
import torch

from equipoise import load_stats
from laws.cases import D, Run, build, same, tight, tokens

B, S, PADDING = 3, 7, 4


def padded(x, fill):
    """The tokens with ``PADDING`` more positions per sequence, in front and behind, and the mask that hides them."""
    front = PADDING // 2
    longer = torch.full((x.shape[0], x.shape[1] + PADDING, D), fill, dtype=x.dtype)
    longer[:, front : front + x.shape[1]] = x.detach()
    mask = torch.zeros(longer.shape[:2], dtype=torch.bool)
    mask[:, front : front + x.shape[1]] = True
    return longer, mask


def window(run):
    """Every sum, the losses' too; both runs make one call."""
    return {name: value.clone() for name, value in run.layer.window.sums.items()}


@pytest.mark.parametrize("fill", [0.0, 1e3, float("nan"), float("inf")])
def test_padding_changes_nothing(make, method, fill):
    plain, more = Run(make(method, shared_experts=1)), Run(make(method, shared_experts=1))
    x = tokens(B, S).requires_grad_()
    longer, mask = padded(x, fill)
    longer.requires_grad_()
    y, z = plain.backward(x), more.backward(longer, mask)
    same(z[mask].view_as(y), y)
    assert not z[~mask].any()
    same(more.gradients(), plain.gradients())
    same(longer.grad[mask].view_as(x), x.grad)
    assert not longer.grad[~mask].any()
    same(window(more), window(plain))
    plain.step(), more.step()
    same(more.state(), plain.state())
    assert load_stats(more.layer)[""].max_vio == load_stats(plain.layer)[""].max_vio


@pytest.mark.parametrize("fill", [0.0, float("nan")])
def test_padding_takes_no_capacity(make, method, fill):
    plain, more = Run(make(method, **tight(method))), Run(make(method, **tight(method)))
    x = tokens(B, S)
    longer, mask = padded(x, fill)
    y, z = plain.backward(x), more.backward(longer, mask)
    same(z[mask].view_as(y), y)
    same(window(more), window(plain))
    assert bool(plain.layer.window.sums["dropped"]) == bool(tight(method))


def test_masked_rows_equal_dropped_rows(make, method):
    masked, dropped = Run(make(method, shared_experts=1)), Run(make(method, shared_experts=1))
    x = tokens(B, S)
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(3)) < 0.6
    y, z = masked.backward(x, mask), dropped.backward(x[mask])
    same(y[mask], z)
    same(masked.gradients(), dropped.gradients())
    same(window(masked), window(dropped))
    masked.step(), dropped.step()
    same(masked.state(), dropped.state())


def test_padding_changes_no_evaluation(make, method):
    layer = make(method).eval()
    x = tokens(B, S)
    longer, mask = padded(x, float("nan"))
    y, z = layer(x), layer(longer, mask)
    same(z[mask].view_as(y), y)
    assert not z[~mask].any()


def test_a_mask_that_hides_nothing_is_no_mask(make, method):
    with_mask, without = Run(make(method)), Run(make(method))
    x = tokens(B, S)
    same(with_mask.backward(x, torch.ones(B, S, dtype=torch.bool)), without.backward(x))
    same(with_mask.gradients(), without.gradients())
    same(window(with_mask), window(without))


def test_padding_is_not_all_that_these_laws_see():
    """The rows that the mask hides would have changed the window, had they been real."""
    hidden, real = Run(build("loss_free")), Run(build("loss_free"))
    longer, mask = padded(tokens(B, S), 1.0)
    hidden.backward(longer, mask), real.backward(longer)
    assert real.counts()["tokens"] == B * (S + PADDING) > hidden.counts()["tokens"] == B * S
