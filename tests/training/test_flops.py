"""The ledger against torch's own counter, which sees every matrix product that really runs."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from equipoise import attach
from equipoise.config import ModelConfig
from equipoise.errors import UserError
from equipoise.experts.swiglu import SwiGLU
from equipoise.models.decoder import Decoder, loss
from equipoise.training.flops import Flops, Ledger

V = 19
SMALL = {"dim": 20, "num_layers": 3, "num_heads": 5, "hidden_dim": 7, "num_experts": 5, "top_k": 2}
LARGER = {"dim": 44, "num_layers": 2, "num_heads": 11, "hidden_dim": 13, "num_experts": 7, "top_k": 3}
CASES = {
    "plain": (SMALL, {"method": "unbalanced"}, 3, 11),
    "larger": (LARGER, {"method": "loss_free"}, 2, 7),
    "one expert per token": (SMALL, {"method": "switch", "top_k": 1}, 3, 7),
    "shared": (SMALL, {"method": "global_batch", "shared_experts": 2}, 2, 13),
    "dense layers": (LARGER, {"method": "quantile", "dense_layers": 1}, 5, 3),
    "nothing routed": (SMALL, {"method": "unbalanced", "dense_layers": 3}, 2, 5),
    "dropped rows": (LARGER, {"method": "unbalanced", "set": ("top_k.capacity_factor=0.6",)}, 3, 11),
    "adamoe": (SMALL, {"method": "adamoe", "set": ("null_experts.nulls=4",)}, 3, 11),
    "expert choice": (SMALL, {"method": "expert_choice", "shared_experts": 1, "dense_layers": 1}, 3, 11),
}


class PlainExperts(SwiGLU):
    """The experts as one dense feed-forward after the other, in products that torch's counter knows."""

    def forward(self, x, routing):
        x_TD = x.flatten(0, -2)
        y_TD, start = torch.zeros_like(x_TD), 0
        for gate_up, down, load in zip(self.gate_up, self.down, routing.load_E.tolist()):
            token_N, weight_N = routing.token_N[start : start + load], routing.weight_N[start : start + load]
            gate, up = F.linear(x_TD[token_N], gate_up).chunk(2, dim=-1)
            y_TD = y_TD.index_add(0, token_N, F.linear(F.silu(gate) * up, down) * weight_N[:, None])
            start += load
        return y_TD.view(x.shape)


@pytest.fixture(params=CASES)
def case(request):
    """A model with plain experts, its tokens, and the mask of the second half of the last sequence."""
    sizes, changes, batch, seq_len = CASES[request.param]
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**{**sizes, **changes}), V)
    for layer in model.layers:
        if layer.moe is not None:
            layer.moe.experts.__class__ = PlainExperts
    mask_BS = torch.ones(batch, seq_len, dtype=torch.bool)
    mask_BS[-1, seq_len // 2 :] = False
    return request.param, model, torch.randint(V, (batch, seq_len)), mask_BS


def rows(model):
    """What the true experts computed; null experts stand behind them."""
    moes = [layer.moe for layer in model.layers if layer.moe is not None]
    return [int(moe.routing.load_E[: moe.num_experts].sum()) for moe in moes]


def check_a_step(model, token_BS, masks):
    """Compare the ledger with what torch counts in one forward and backward pass, and in the forward pass alone."""
    ledger = Ledger.of(model, token_BS.shape[1])
    handle = attach(model, []) if ledger.row else None
    for mask_BS in masks:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            value = loss(model(token_BS, mask_BS=mask_BS), token_BS)
            forward = counter.get_total_flops()
            (handle.follow(value) if handle else value).backward()
        assert ledger.forward_flops(token_BS.numel(), rows(model)).total == forward
        assert ledger.step_flops(token_BS.numel(), rows(model)).total == counter.get_total_flops()


def test_a_step_costs_what_torch_counts_to_the_last_flop(case):
    _, model, token_BS, mask_BS = case
    check_a_step(model, token_BS, [None, mask_BS])


@pytest.mark.parametrize("kernel", ["naive", "loop", "grouped_mm"])
def test_torch_counts_our_operators_alike(kernel):
    torch.manual_seed(0)
    config = ModelConfig(
        **{**SMALL, "hidden_dim": 12}, kernel=kernel, method="unbalanced", set=("top_k.capacity_factor=0.6",)
    )
    model, token_BS = Decoder(config, V), torch.randint(V, (2, 7))
    check_a_step(model, token_BS, [None])
    assert max(rows(model)) < 28


def test_each_part_costs_what_torch_counts_in_it(case):
    _, model, token_BS, _ = case
    with FlopCounterMode(display=False, depth=None) as counter, sdpa_kernel(SDPBackend.MATH):
        model(token_BS)
    counted = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    parts = {
        "router": ".moe.router",
        "routed": ".moe.experts",
        "shared": ".moe.shared",
        "attention": ".attention",
        "dense": ".dense",
    }
    sums = {
        part: sum(flops for name, flops in counted.items() if name.endswith(ending)) for part, ending in parts.items()
    }
    sums["head"] = counted["Global"] - sum(sums.values())
    assert Ledger.of(model, token_BS.shape[1]).forward_flops(token_BS.numel(), rows(model)) == Flops(**sums)


def test_the_cases_hold_what_they_are_named_for(case):
    name, model, token_BS, mask_BS = case
    model(token_BS)
    full, tokens = rows(model), token_BS.numel()
    model(token_BS, mask_BS=mask_BS)
    bound = [tokens * layer.moe.top_k for layer in model.layers if layer.moe is not None]
    assert all(some < every for some, every in zip(rows(model), full))
    fewer = name in ("dropped rows", "adamoe", "expert choice")
    assert all(some < most if fewer else some == most for some, most in zip(full, bound))


def test_by_hand():
    """One layer of each kind: D=4, F=3, E=5, K=2, one shared expert; 6 tokens in sequences of 3; 7 rows computed."""
    sizes = {"dim": 4, "num_layers": 2, "num_heads": 1, "hidden_dim": 3, "num_experts": 5, "top_k": 2}
    model = Decoder(ModelConfig(**sizes, shared_experts=1, dense_layers=1, method="unbalanced"), V)
    ledger = Ledger.of(model, seq_len=3)
    attention = 2 * (6 * 2 * (4 * 12 + 4 * 4) + 2 * 2 * (2 * 3 * 3 * 4))
    swiglu = 2 * (4 * 6 + 3 * 4)
    expected = Flops(attention, 6 * 2 * 4 * 5, 7 * swiglu, 6 * swiglu, 6 * 2 * swiglu, 6 * 2 * 4 * V)
    assert ledger.forward_flops(6, [7]) == expected
    assert expected.total == 2112 + 240 + 504 + 432 + 864 + 912
    assert ledger.step_flops(6, [7]) == expected * 3
    assert ledger.step_flops(6, [12]) == ledger.per_token() * 6


def test_a_model_without_experts_is_planned_too():
    """One dense layer of D=4, F=3; sequences of 3."""
    sizes = {"dim": 4, "num_layers": 1, "num_heads": 1, "hidden_dim": 3, "dense_layers": 1}
    model = Decoder(ModelConfig(**sizes), V)
    ledger = Ledger.of(model, seq_len=3)
    dense = sum(weight.numel() for weight in model.layers[0].dense.parameters())
    token = 2 * (4 * 12 + 4 * 4) + 2 * 2 * 3 * 4 + 2 * dense + 2 * 4 * V
    assert ledger.plan == {0: ()}
    assert ledger.per_token(7).total == 3 * token
    assert ledger.steps(13 * 3.0 * token * 11, tokens=13) == 11


def test_each_layer_needs_its_rows():
    with pytest.raises(UserError, match="There are 3 MoE layers"):
        Ledger.of(Decoder(ModelConfig(**SMALL, method="unbalanced"), V), 7).step_flops(7, [14, 14])
