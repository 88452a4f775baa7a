"""Parts whose state is one over all layers: whose counts move them."""

import pytest
import torch
from torch import nn

from equipoise import MoE, UserError
from hand_made import attach_still

SIZES = {"dim": 7, "hidden_dim": 5, "num_experts": 5, "top_k": 2, "kernel": "loop"}


def test_a_part_that_is_one_over_all_layers_moves_by_the_sums_of_those_that_have_it():
    """Three layers have a pool's loss, one of them idle; one has another such part, and two have parts of their own."""
    pools = dict.fromkeys(("first", "second", "idle"), "unipool")
    methods = pools | {"relu": "relu", "plain": "loss_free", "other": "loss_free"}
    model = nn.ModuleDict({name: MoE(**SIZES, method=method) for name, method in methods.items()})
    _, optimizer = attach_still(model)
    for name, tokens in (("first", 11), ("plain", 5), ("second", 7), ("relu", 3), ("second", 2), ("other", 13)):
        model[name](torch.randn(tokens, 7)).square().mean().backward()
    own = {name: layer.window.sums["demand_E"].clone() for name, layer in model.items() if name != "idle"}
    assert {name: int(demand_E.sum()) for name, demand_E in own.items() if name != "relu"} == {
        "first": 22,
        "second": 18,
        "plain": 10,
        "other": 26,
    }
    optimizer.step()
    pool_E = own["first"] + own["second"]
    for name in ("first", "second", "idle"):
        last = model[name].window.last
        assert torch.equal(last["pool_loss.demand_E"], pool_E)
        assert int(last["pool_loss.layers"]) == 3
        assert torch.equal(last["demand_E"], own.get(name, torch.zeros_like(pool_E)))
        torch.testing.assert_close(model[name].balancers["pool_loss"].price_E, pool_E * 5 / (40 * 3))
    relu = model["relu"].window.last
    assert [int(relu[f"relu_loss.{key}"]) for key in ("rows", "wanted", "possible", "layers")] == [
        int(own["relu"].sum()),
        6,
        15,
        1,
    ]
    assert not any(name.startswith("pool_loss") for name in relu)
    for name in ("plain", "other"):
        last = model[name].window.last
        assert torch.equal(last["bias.demand_E"], own[name])
        assert not any(key.endswith(".layers") for key in last)


def test_layers_of_unequal_numbers_of_experts_cannot_share_what_counts_for_each_expert():
    def model(method: str) -> nn.ModuleList:
        return nn.ModuleList([MoE(**SIZES | {"num_experts": number}, method=method) for number in (5, 6)])

    with pytest.raises(UserError, match="Layers that share pool_loss must have equally many experts"):
        attach_still(model("unipool"))
    for method in ("relu", "loss_free"):  # one counts no experts, the other's layers share nothing
        attach_still(model(method))
