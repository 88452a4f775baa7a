import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from equipoise import MoE
from equipoise.balancing.balance_loss import BalanceLoss
from equipoise.balancing.flat import pack, unpack
from equipoise.balancing.window import Window
from equipoise.balancing.z_loss import ZLoss
from hand_made import attach_still

SIZES = {"dim": 7, "hidden_dim": 5, "num_experts": 5, "top_k": 2, "kernel": "loop"}
COUNTS = {"demand_E": torch.tensor([3, 1, 0]), "tokens": torch.tensor(2)}


class Closer:
    """What a window asks of its handle."""

    world_size = 1

    def __init__(self, scale):
        self.scale = scale

    def scale_of(self, tokens):
        return self.scale


def window_of(**balancers):
    window = Window(nn.ModuleDict(balancers), learns=False)
    window.handle = Closer(1.0)
    return window


def record(window, losses, statistics):
    """Add one micro-batch and return the gradient of each carrier."""
    amounts = {name: value for name, value in statistics.items() if value.is_floating_point()}
    counts = {name: value for name, value in statistics.items() if name not in amounts}
    (carrier, loss), (count, counted), (amount, rest) = (
        pack(part, torch.ones(1)) for part in (losses, counts, amounts)
    )
    return unpack(window.record(carrier, count, amount, f"{loss};{counted};{rest}"), loss)


def test_sums_add_up_in_their_own_kind():
    window = window_of()
    record(window, {}, {**COUNTS, "demand_E": torch.tensor([2**53 + 1, 1, 0]), "margin": torch.tensor([0.5, 0.25])})
    record(window, {}, {**COUNTS, "margin": torch.tensor([0.125, 1.0])})
    assert window.sums["demand_E"].tolist() == [2**53 + 4, 2, 0]
    assert window.sums["tokens"].item() == 4
    assert window.sums["margin"].tolist() == [0.625, 1.25]
    assert window.sums["calls"].item() == 2


def test_its_sums_are_read_without_a_wait():
    """A graph would show the copy of the host's number, which a device waits for."""
    window = window_of()
    record(window, {}, COUNTS)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda: window.sums["calls"])()
    assert "lift_fresh" not in graph.code
    assert graph().item() == 1


def test_a_cleared_window_holds_nothing():
    window = window_of()
    assert window.sums == {}
    record(window, {}, COUNTS)
    window.clear()
    assert window.sums == {}


def test_without_a_handle_every_micro_batch_is_a_window():
    window = Window(nn.ModuleDict(), learns=False)
    record(window, {}, COUNTS)
    record(window, {}, COUNTS)
    assert window.sums["demand_E"].tolist() == [3, 1, 0]
    assert window.sums["calls"].item() == 1


def test_a_scalar_loss_is_recorded_raw_by_token_and_its_gradient_is_scale_times_weight():
    window = window_of(z_loss=ZLoss(3, weight=0.25))
    window.handle = Closer(torch.tensor(8.0))
    assert record(window, {"z_loss": torch.tensor(1.5)}, COUNTS)["z_loss"].item() == 2
    assert window.sums["loss.z_loss"].item() == 1.5 * COUNTS["tokens"]


def test_the_global_scopes_slope_follows_the_demand_so_far():
    window = window_of(balance_loss=BalanceLoss(3, weight=0.5), z_loss=ZLoss(3, weight=0.25))
    losses = {"balance_loss": torch.tensor([0.5, 0.25, 0.25]), "z_loss": torch.tensor(1.5)}
    first = record(window, losses, COUNTS)
    second = record(window, losses, {**COUNTS, "demand_E": torch.tensor([0, 0, 4])})
    torch.testing.assert_close(first["balance_loss"], 0.5 * 3 * torch.tensor([3, 1, 0]) / 4)
    torch.testing.assert_close(second["balance_loss"], 0.5 * 3 * torch.tensor([3, 1, 4]) / 8)
    assert first["z_loss"].item() == second["z_loss"].item() == 0.25
    values = 3 * (0.75 * 0.5 + 0.25 * 0.25), 3 * (0.375 * 0.5 + 0.125 * 0.25 + 0.5 * 0.25)
    assert window.sums["loss.balance_loss"].item() == pytest.approx(sum(values) * COUNTS["tokens"])
    assert window.sums["loss.z_loss"].item() == 3 * COUNTS["tokens"]


@pytest.mark.parametrize(
    ("method", "words"),
    [("loss_free", "attach"), ("quantile", "attach"), ("global_batch", "attach"), ("switch", "follow")],
)
def test_training_without_a_handle_warns_once_and_names_what_is_missing(method, words):
    layer = MoE(**SIZES, method=method)
    with pytest.warns(UserWarning, match=words):
        layer(torch.randn(11, 7)).sum().backward()
    layer(torch.randn(11, 7)).sum().backward()


def test_a_method_that_needs_nothing_does_not_warn():
    MoE(**SIZES, method="unbalanced")(torch.randn(11, 7)).sum().backward()


def test_a_handle_without_a_scale_warns_once_and_uses_one():
    layer = MoE(**SIZES, method="switch", weight=1.0)
    handle, _ = attach_still(layer, loss_scale=None)
    x = torch.randn(11, 7)
    with pytest.warns(UserWarning, match=r"handle\.follow.*loss_scale"):
        (0 * layer(x).sum()).backward()
    assumed = layer.router.weight.grad.clone()
    (0 * layer(x).sum()).backward()
    layer.router.weight.grad = None
    handle.loss_scale = 1.0
    (0 * layer(x).sum()).backward()
    torch.testing.assert_close(layer.router.weight.grad, assumed)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copied_layer_counts_into_a_window_of_its_own(copied):
    layer = MoE(**SIZES, method="switch")
    attach_still(layer)
    twin = copied(MoE(**SIZES, method="switch"))
    attach_still(twin)
    twin(torch.randn(11, 7)).sum().backward()
    assert layer.window.sums == {}
    assert twin.window.sums["demand_E"].sum() == 22
    assert twin.window.balancers is twin.balancers


def test_copying_an_attached_layer_copies_neither_handle_nor_counts():
    layer = MoE(**SIZES, method="unbalanced")
    attach_still(layer)
    layer(torch.randn(11, 7)).sum().backward()
    twin = copy.deepcopy(layer)
    assert twin.window.handle is None
    assert twin.window.sums == {}
    assert layer.window.sums["demand_E"].sum() == 22


def test_a_graph_may_outlive_its_layer_and_a_layer_leaves_nothing_behind():
    layer, x = MoE(**SIZES, method="unbalanced"), torch.randn(11, 7, requires_grad=True)
    y, window = layer(x), weakref.ref(layer.window)
    del layer
    gc.collect()
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    del y
    gc.collect()
    assert window() is None
