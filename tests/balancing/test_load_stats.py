import math

import pytest
import torch
from torch import nn

from equipoise import LoadStats, MoE, UserError, load_stats
from hand_made import attach_still

SIZES = {"dim": 7, "hidden_dim": 5, "num_experts": 5, "top_k": 2, "kernel": "loop"}
QUARTERS = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)


@pytest.mark.parametrize(
    ("load", "max_vio", "cv", "entropy", "dead"),
    [
        ([4, 4, 4, 4], 0, 0, 1, 0),
        ([8, 0, 0, 0], 3, math.sqrt(3), 0, 3),
        ([6, 2], 0.5, 0.5, QUARTERS, 0),
        ([4, 4, 0, 0], 1, 1, 0.5, 2),
        ([0, 0, 0], 0, 0, 1, 3),
        ([7], 0, 0, 1, 0),
        ([0], 0, 0, 1, 1),
        ([2**60, 2**60], 0, 0, 1, 0),
        ([2**24 + 3, 2**24 - 3], 3 / 2**24, 3 / 2**24, 1, 0),  # as counts of a long run, which fp32 would round
    ],
)
def test_values_of_hand_made_loads(load, max_vio, cv, entropy, dead):
    stats = LoadStats.of(torch.tensor(load))
    assert stats.load.tolist() == load
    assert (stats.max_vio, stats.cv, stats.entropy) == pytest.approx((max_vio, cv, entropy))
    assert (stats.dead, stats.dropped, stats.loss, stats.scope) == (dead, 0, {}, "call")


def test_losses_are_told_raw_and_weighted():
    stats = LoadStats.of(torch.tensor([1, 1]), dropped=3, loss={"z_loss": (2.0, 0.5)}, scope="window")
    assert (stats.dropped, stats.loss, stats.weighted_loss) == (3, {"z_loss": 2.0}, {"z_loss": 0.5})


def test_before_a_step_it_tells_of_the_last_call():
    layer = MoE(**SIZES, method="unbalanced")
    layer.eval()(torch.randn(11, 7))
    layer(torch.randn(3, 7), torch.tensor([True, True, False]))
    stats = load_stats(layer)[""]
    assert stats.load.sum() == 4
    assert torch.equal(stats.load, layer.routing.load_E)
    assert stats.scope == "call"


def test_dropped_rows_belong_to_the_load_and_are_told():
    layer = MoE(**SIZES, method="unbalanced", capacity_factor=0.5)
    layer(torch.randn(11, 7))
    stats = load_stats(layer)[""]
    assert stats.load.sum() == 22
    assert stats.dropped == 22 - layer.routing.load_E.sum() > 0


def test_after_a_step_it_tells_of_the_steps_window():
    layer = MoE(**SIZES, method="switch", weight=0.25, z_loss=0.5, capacity_factor=0.5)
    _, optimizer = attach_still(layer)
    demand_E, dropped, values = 0, 0, []
    for tokens in (11, 5, 7):
        x = torch.randn(tokens, 7)
        layer(x).sum().backward()
        demand_E = demand_E + layer.routing.demand_E()
        dropped += int(layer.routing.dropped_E.sum())
        logit_TE = (x @ layer.router.weight.T).detach()
        prob_E = logit_TE.softmax(1).mean(0)
        share_E = layer.routing.demand_E() / (2 * tokens)
        values.append((5 * (share_E * prob_E).sum().item(), logit_TE.logsumexp(1).square().mean().item()))
    optimizer.step()
    stats = load_stats(layer)[""]
    balance, z = (sum(value * count for value, count in zip(each, (11, 5, 7))) / 23 for each in zip(*values))
    assert stats.scope == "window"
    assert torch.equal(stats.load, demand_E)
    assert stats.dropped == dropped > 0
    assert stats.loss == pytest.approx({"balance_loss": balance, "z_loss": z})
    assert stats.weighted_loss == pytest.approx({"balance_loss": balance / 4, "z_loss": z / 2})


def test_the_last_step_stays_visible_while_the_next_window_fills():
    layer = MoE(**SIZES, method="unbalanced")
    _, optimizer = attach_still(layer)
    layer(torch.randn(11, 7)).sum().backward()
    optimizer.step()
    layer(torch.randn(5, 7)).sum().backward()
    assert load_stats(layer)[""].load.sum() == 22


def test_where_no_handle_commits_any_more_it_tells_of_the_last_call():
    layer = MoE(**SIZES, method="unbalanced")
    handle, optimizer = attach_still(layer)
    layer(torch.randn(11, 7)).sum().backward()
    optimizer.step()
    handle.remove()
    layer.eval()(torch.randn(3, 7))
    stats = load_stats(layer)[""]
    assert (stats.scope, stats.load.sum().item()) == ("call", 6)


def test_layers_go_by_their_names_in_the_model_without_its_wrappers():
    def model():
        blocks = nn.ModuleList([nn.Linear(7, 7), MoE(**SIZES, method="unbalanced")])
        return nn.ModuleDict({"blocks": blocks, "last": MoE(**SIZES, method="unbalanced")})

    plain, wrapped = model(), torch.compile(model(), backend="eager")
    for layer in [*plain.modules(), *wrapped.modules()]:
        if isinstance(layer, MoE):
            layer.eval()(torch.randn(3, 7))
    assert list(load_stats(plain)) == ["blocks.1", "last"]
    assert list(load_stats(wrapped)) == ["blocks.1", "last"]


def test_a_layer_that_was_not_called_is_named():
    model = nn.ModuleDict({"first": MoE(**SIZES), "second": MoE(**SIZES)})
    model["first"].eval()(torch.randn(3, 7))
    with pytest.raises(UserError, match="'second' has not been called"):
        load_stats(model)
    with pytest.raises(UserError, match="Layer 'MoE' has not been called"):
        load_stats(model["second"])


def test_a_model_without_moe_layers_is_refused():
    with pytest.raises(UserError, match="no MoE layer"):
        load_stats(nn.Linear(3, 3))


def test_null_experts_are_told_apart_from_true_ones():
    """Before a step from the last call, after it from the window: the load is the true experts', the share the rest."""
    layer = MoE(dim=7, hidden_dim=5, num_experts=3, top_k=2, method="adamoe", nulls=4)
    handle, optimizer = attach_still(layer)
    layer(torch.randn(11, 7)).sum().backward()
    total_E = layer.routing.demand_E()
    for scope in ("call", "window"):
        stats = load_stats(layer)[""]
        assert stats.scope == scope
        assert torch.equal(stats.load, total_E[:3])
        assert stats.nulls == pytest.approx(float(total_E[3:].sum()) / 22)
        assert stats.max_vio == pytest.approx(float(total_E[:3].max() / total_E[:3].double().mean()) - 1)
        optimizer.step()
    assert handle.layers[""] is layer


def test_a_layer_that_saw_nothing_in_a_step_has_no_load_no_share_and_no_loss():
    used, idle = (MoE(**SIZES | {"top_k": 1}, method="adamoe", nulls=4) for _ in range(2))
    model = nn.ModuleList([used, idle])
    _, optimizer = attach_still(model)
    used(torch.randn(11, 7)).sum().backward()
    optimizer.step()
    stats = load_stats(model)["1"]
    assert (stats.load.tolist(), stats.nulls, stats.entropy) == ([0] * 5, 0.0, 1.0)
    assert stats.loss == stats.weighted_loss == {"null_loss": 0.0}


def test_readings_are_those_of_the_layers_parts():
    """After a step, too, though the bias has no loss; the last call's shows in no reading."""
    layer = MoE(dim=7, hidden_dim=5, num_experts=3, top_k=2, method="loss_free", rate=0.125)
    _, optimizer = attach_still(layer)
    layer.balancers["bias"].bias_E.copy_(torch.tensor([0.25, 0.0, -0.25]))
    layer.router.weight.data.zero_()  # so that expert 0 and 1 take all
    layer(torch.randn(11, 7)).sum().backward()
    assert load_stats(layer)[""].readings == {"bias.spread": 0.5, "bias.overshoots": 0.0}
    optimizer.step()
    stats = load_stats(layer)[""]
    assert stats.load.tolist() == [11, 11, 0]
    assert (stats.scope, stats.loss) == ("window", {})
    assert stats.readings == {"bias.spread": 0.25, "bias.overshoots": 0.0}
