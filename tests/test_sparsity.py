"""K by step: what a schedule says, what a layer and a budget make of it."""

import copy
import pickle
from types import MappingProxyType

import pytest
import torch

from equipoise import MoE, UserError, attach
from equipoise.config import ModelConfig
from equipoise.models.decoder import Decoder
from equipoise.sparsity import Sparsity, parse
from equipoise.training.flops import Ledger

SIZES = {"dim": 7, "hidden_dim": 5, "num_experts": 5}


def test_k_holds_from_its_step_on():
    sparsity = Sparsity.of({3: 1, 0: 4}, 5)
    assert [sparsity.at(step) for step in (0, 1, 2, 3, 4, 1000)] == [4, 4, 4, 1, 1, 1]
    assert sparsity.by_step() == {0: 4, 3: 1}
    assert not sparsity.constant
    assert Sparsity.of(2, 5) == Sparsity.of({0: 2}, 5)
    assert Sparsity.of(2, 5).constant
    assert Sparsity.of(MappingProxyType({0: 5, 3: 1}), 5).by_step() == {0: 5, 3: 1}
    three = Sparsity.of({0: 4, 5: 1, 2: 3}, 5)
    assert [three.at(step) for step in (0, 1, 2, 4, 5, 99)] == [4, 4, 3, 3, 1, 1]


@pytest.mark.parametrize(
    ("top_k", "sentence"),
    [
        (0, "top_k=0 must lie between 1 and num_experts=5"),
        (6, "top_k=6 must lie between 1 and num_experts=5"),
        ({0: 2, 7: 6}, "top_k=6 must lie between 1 and num_experts=5"),
        ({1: 2}, "by step from step 0 on"),
        ({}, "by step from step 0 on"),
        (True, "top_k=True must be a whole number"),
        ({0: 2, 1.5: 1}, "by step from step 0 on"),
    ],
)
def test_what_is_no_schedule_is_refused(top_k, sentence):
    with pytest.raises(UserError, match=sentence):
        MoE(**SIZES, top_k=top_k)


def test_a_model_takes_one_k_for_all_layers_or_one_each():
    assert [layer.by_step() for layer in parse(("0:4,2", "9:1"), 3, 2, 5)] == [{0: 4, 9: 1}, {0: 2, 9: 1}]
    assert [layer.by_step() for layer in parse((), 3, 2, 5)] == [{0: 3}, {0: 3}]
    assert [layer.by_step() for layer in parse(("20:1,2", "0:5", "10:3"), 4, 2, 5)] == [
        {0: 5, 10: 3, 20: 1},
        {0: 5, 10: 3, 20: 2},
    ]
    with pytest.raises(UserError, match=r"sparsity '0:4,2' names 2 layers, but the model has 3 MoE layers"):
        parse(("0:4,2",), 3, 3, 5)
    with pytest.raises(UserError, match="sparsity names step 9 twice"):
        parse(("0:4", "9:1", "9:2"), 3, 2, 5)
    config = ModelConfig(num_layers=3, dense_layers=1, num_experts=5, sparsity=("0:4,2", "9:1"))
    assert [layer.moe.top_k for layer in Decoder(config, 11).layers[1:]] == [4, 2]
    plain = ModelConfig(num_layers=2, num_experts=5, top_k=3)
    assert [layer.moe.top_k for layer in Decoder(plain, 11).layers] == [3, 3]


def test_a_layer_changes_k_with_the_steps_and_after_loading():
    """Router, dispatch, counts and loss change together, since all read the same call."""
    layer = MoE(**SIZES, top_k={0: 4, 2: 1}, method="switch", renormalize=False)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    handle = attach(layer, optimizer)
    rows, losses = [], []
    for _ in range(4):
        handle.follow(layer(torch.randn(11, 7)).square().mean()).backward()
        optimizer.step()
        rows.append(int(layer.window.last["demand_E"].sum()))
        losses.append(float(layer.window.last["loss.balance_loss"]) / 11)
    assert rows == [44, 44, 11, 11]
    assert all(0.8 < loss < 2 for loss in losses)  # near 1, whatever K: the loss's frequencies are shares
    assert len(layer(torch.randn(3, 7))) == 3
    assert layer.routing.load_E.sum() == 3
    layer.load_state_dict(before)
    layer(torch.randn(3, 7))
    assert layer.routing.load_E.sum() == 12


def test_a_forward_does_not_read_the_step():
    """On a GPU it would wait there; on "meta" there is nothing to read."""
    layer = MoE(**SIZES, top_k={0: 4, 2: 1}).to("meta")
    assert layer(torch.zeros(11, 7, device="meta")).shape == (11, 7)


def test_a_copy_follows_what_it_loads():
    layer = MoE(**SIZES, top_k={0: 4, 2: 1})
    later = layer.state_dict() | {"step": torch.tensor(2)}
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.nn.ModuleList([copied]).load_state_dict({f"0.{name}": value for name, value in later.items()})
        assert (copied.top_k, layer.top_k) == (1, 4)


def test_the_ledger_integrates_the_schedule():
    sizes = {"dim": 8, "num_heads": 2, "num_layers": 2, "hidden_dim": 4, "num_experts": 5}
    ledger = Ledger.of(Decoder(ModelConfig(**sizes, sparsity=("0:4,3", "10:1")), 11), seq_len=6)
    row = 2 * 3 * 4 * 8
    early, late = ledger.per_token(9), ledger.per_token(10)
    assert early.routed == 3 * row * 7
    assert late.routed == 3 * row * 2
    assert early.total - late.total == 3 * row * 5
    budget = 13.0 * (10 * early.total + 7 * late.total)
    assert ledger.steps(budget, tokens=13) == 17
    assert ledger.steps(budget - 13 * 10 * early.total, tokens=13, done=10) == 17
    assert ledger.steps(4.4 * 13 * early.total, tokens=13) == 4


def test_the_ledger_counts_from_any_step_through_all_that_follow():
    """Steps 0 to 9, 10 to 13 and from 14 on cost differently."""
    sizes = {"dim": 8, "num_heads": 2, "num_layers": 2, "hidden_dim": 4, "num_experts": 5}
    ledger = Ledger.of(Decoder(ModelConfig(**sizes, sparsity=("14:1,2", "0:4", "10:2,3")), 11), seq_len=6)
    assert ledger.plan == {0: (4, 4), 10: (2, 3), 14: (1, 2)}
    early, middle, late = (13.0 * ledger.per_token(step).total for step in (0, 10, 14))
    assert early > middle > late
    for done, flops in (
        (0, 10 * early + 4 * middle + 5 * late),
        (3, 7 * early + 4 * middle + 5 * late),
        (10, 4 * middle + 5 * late),
        (12, 2 * middle + 5 * late),
        (14, 5 * late),
        (16, 3 * late),
    ):
        assert ledger.steps(flops, tokens=13, done=done) == 19
    assert ledger.steps(10 * early, tokens=13) == 10
    assert ledger.steps(10 * early + 2.6 * middle, tokens=13) == 13
    assert ledger.steps(2.4 * early, tokens=13, done=3) == 5
