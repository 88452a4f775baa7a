import dataclasses

import pytest
import torch
from torch import nn

from equipoise import NonFiniteError, Routing, UserError
from equipoise.balancing import BALANCERS
from equipoise.contracts import Stateful
from hand_made import call_of

T, E = 7, 5
MASK_T = torch.tensor([True, False, True, True, False, False, True])


def test_the_mean_is_over_the_real_tokens():
    value_TE = torch.randn(T, E)
    assert torch.equal(call_of(value_TE, 1).mean(value_TE), value_TE.sum(0) / T)
    assert torch.equal(call_of(value_TE, 1, MASK_T).mean(value_TE), (value_TE * MASK_T[:, None]).sum(0) / 4)
    torch.testing.assert_close(call_of(value_TE, 1, MASK_T).mean(value_TE[:, 0]), value_TE[MASK_T, 0].mean())


def test_the_mean_ignores_what_padding_holds_and_gives_it_no_gradient():
    value_TE = torch.randn(T, E).masked_fill(~MASK_T[:, None], torch.nan).requires_grad_()
    mean_E = call_of(torch.randn(T, E), 1, MASK_T).mean(value_TE)
    mean_E.sum().backward()
    torch.testing.assert_close(mean_E.detach(), value_TE.detach()[MASK_T].mean(0))
    assert torch.equal(value_TE.grad, (MASK_T / 4)[:, None].expand(T, E))


@pytest.mark.parametrize("mask_T", [None, MASK_T & False])
def test_the_mean_of_no_tokens_is_zero(mask_T):
    value_TE = torch.randn(0 if mask_T is None else T, E)
    call = call_of(value_TE, 1, mask_T)
    assert call.mean(value_TE).tolist() == [0] * E
    assert call.tokens().item() == 0


def test_tokens_are_counted_in_int64():
    for mask_T, tokens in ((None, T), (MASK_T, 4)):
        count = call_of(torch.randn(T, E), 1, mask_T).tokens()
        assert (count.item(), count.dtype, count.dim()) == (tokens, torch.int64, 0)


def routing():
    weight_N = torch.rand(3, requires_grad=True)
    return Routing(
        torch.tensor([0, 1, 1]), torch.tensor([0, 0, 2]), weight_N * 2, torch.tensor([2, 0]), torch.tensor([1, 4])
    )


def test_demand_is_load_and_dropped_rows():
    assert routing().demand_E().tolist() == [3, 4]


def test_detaching_keeps_every_value_and_drops_the_gradient():
    attached = routing()
    detached = attached.detach()
    assert not detached.weight_N.requires_grad
    for field in dataclasses.fields(Routing):
        assert torch.equal(getattr(detached, field.name), getattr(attached, field.name))


def test_records_cannot_be_changed():
    call, record = call_of(torch.randn(T, E), 1), routing()
    for frozen, name in ((call, "k"), (record, "load_E")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, None)


def test_a_nonfinite_error_is_the_users_and_names_its_layer():
    layer = nn.Linear(2, 3)
    error = NonFiniteError(layer)
    assert error.layer is layer
    assert isinstance(error, UserError)
    assert isinstance(error, ValueError)
    assert "NaN or infinity" in str(error)


def test_stateful_parts_are_those_that_count_and_update():
    stateful = {name for name, balancer in BALANCERS.items() if isinstance(balancer(3), Stateful)}
    assert stateful == {"bias", "bip", "pool_loss", "quantile", "relu_loss"}
