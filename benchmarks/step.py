"""One training step of the demo's model: against transformers' Mixtral block, and what balancing adds to it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from cases import DEMO, DEMO_BATCH, DEMO_SEQ_LEN
from measure import interleaved, ratio
from torch import nn

import equipoise as eq
from equipoise.balancing.balanced import balanced_layers
from equipoise.models.decoder import Decoder, loss
from equipoise.routing.override import forced_balance

BACKENDS = ("eager", "grouped_mm")  # batched_mm gathers a weight per row: it was 20 times slower, and is left out


def against_transformers(rounds: int) -> dict[str, Any]:
    """The step with our layer (global_batch, attached) over the step with transformers' block, for each CPU backend."""
    candidates = {"equipoise": _step(_decoder("global_batch"), attached=True)}
    candidates |= {name: _step(_mixtral(name), attached=False) for name in BACKENDS}
    seconds = interleaved(candidates, rounds)
    medians = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
    fastest = min(BACKENDS, key=medians.__getitem__)
    return {
        "fastest_backend": fastest,
        "ratio_to_fastest": ratio(seconds["equipoise"], seconds[fastest]),
        "ratio_to": {name: ratio(seconds["equipoise"], seconds[name]) for name in BACKENDS},
        "median_seconds": medians,
        "seconds": seconds,
    }


def bookkeeping(rounds: int) -> dict[str, Any]:
    """The step with tap, statistics, losses and update over the same step without any; routing forced equal in both.

    Each method is timed beside its own bare twin and the same twin again: the second pair is the spread that a true
    ratio of 1 shows on this machine.
    """
    found = {}
    for method in eq.METHODS:
        if method == "expert_choice":
            continue  # its load is equal by construction, and forced routing would replace it
        candidates = {
            "balanced": _step(_decoder(method), attached=True, forced=True),
            "bare": _step(_bare(_decoder(method)), attached=False, forced=True),
            "bare_again": _step(_bare(_decoder(method)), attached=False, forced=True),
        }
        seconds = interleaved(candidates, rounds)
        found[method] = {
            "ratio": ratio(seconds["balanced"], seconds["bare"]),
            "ratio_of_equals": ratio(seconds["bare_again"], seconds["bare"]),
            "seconds": seconds,
        }
    return found


def _decoder(method: str) -> Decoder:
    torch.manual_seed(0)
    return Decoder(replace(DEMO, method=method), vocab_size=256)


def _step(model: nn.Module, attached: bool, forced: bool = False) -> Callable[[], None]:
    """A training step: forward, backward, clip, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    handle = eq.attach(model, optimizer) if attached else None
    token_BS = torch.randint(256, (DEMO_BATCH, DEMO_SEQ_LEN + 1))
    if forced:
        for layer in balanced_layers(model).values():
            layer.override = forced_balance

    def step() -> None:
        value = loss(model(token_BS[:, :-1]), token_BS[:, 1:])
        (handle.follow(value) if handle else value).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _bare(model: Decoder) -> Decoder:
    """The model as it would be if nothing balanced it: a layer in evaluation has no loss, no statistic and no tap."""
    for layer in balanced_layers(model).values():
        layer.balancers.clear()
        layer.eval()
    return model


def _mixtral(backend: str) -> Decoder:
    """The demo's decoder with transformers' sparse block in every layer, same weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    model = _decoder("unbalanced")
    config = MixtralConfig(
        hidden_size=DEMO.dim,
        intermediate_size=DEMO.hidden_dim,
        num_local_experts=DEMO.num_experts,
        num_experts_per_tok=DEMO.top_k,
        experts_implementation=backend,
    )
    for layer in model.layers:
        block = MixtralSparseMoeBlock(config)
        block.load_state_dict(
            {
                "gate.weight": layer.moe.router.weight.detach(),
                "experts.gate_up_proj": layer.moe.experts.gate_up.detach(),
                "experts.down_proj": layer.moe.experts.down.detach(),
            }
        )
        layer.moe = _Block(block)
    return model


class _Block(nn.Module):
    """transformers' block behind our layer's signature."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.block(x)
