"""One hook in place of the selector: routing replay, forced balance, and tests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from equipoise.balancing.balanced import balanced_layers
from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require
from equipoise.routing.rows import pack, unmasked
from equipoise.routing.selector import Selector

Hook = Callable[[Call, Scores, Selector], Routing]


@contextmanager
def override(model: nn.Module, hook: Hook | dict[str, Hook]) -> Iterator[None]:
    """Let ``hook`` choose the rows of every MoE layer of ``model`` inside the block.

    Args:
        hook: one for all layers, or one per layer name.
    Fails: UserError for a name that is no MoE layer's.
    """
    layers = balanced_layers(model)
    require(bool(layers), "The model has no MoE layer, so there is nothing to override.")
    hooks = hook if isinstance(hook, dict) else dict.fromkeys(layers, hook)
    unknown = sorted(set(hooks) - set(layers))
    names = ", ".join(map(repr, layers))
    require(not unknown, f"No MoE layer is called {', '.join(map(repr, unknown))}; the layers are {names}.")
    before = {name: layers[name].override for name in hooks}
    try:
        for name, chosen in hooks.items():
            layers[name].override = chosen
        yield
    finally:
        for name, previous in before.items():
            layers[name].override = previous


def replay(recorded: Routing) -> Hook:
    """Route as ``recorded``, with weights read from the live gate, so that the router keeps its gradient.

    Fails: UserError for a recording with dropped rows, whose share of their tokens' weights nobody knows; the hook, for
    a call of another size than the recorded one.
    """
    dropped = int(recorded.dropped_E.sum())
    require(not dropped, f"{dropped} rows of the recording were dropped; record without capacity_factor to replay.")

    def hook(call: Call, scores: Scores, selector: Selector) -> Routing:
        rows, recorded_rows = selector.rows_of(call, scores.gate_TE.shape[1]), len(recorded.token_N)
        require(rows == recorded_rows, f"The recording has {recorded_rows} rows, but this call has {rows}.")
        expert_N = unmasked(call, recorded.token_N, recorded.expert_N, scores.gate_TE.shape[1])
        weight_N = selector.weigh(call, scores, recorded.token_N, expert_N)
        return pack(scores, recorded.token_N, expert_N, weight_N)

    return hook


def forced_balance(call: Call, scores: Scores, selector: Selector) -> Routing:
    """Deal the experts out in turn: loads differ by one row at most, whatever the scores (for measuring speed)."""
    num_tokens, unused = scores.gate_TE.shape
    device = scores.gate_TE.device
    token_N = torch.arange(num_tokens, device=device).repeat_interleave(call.k)
    place_T = torch.arange(num_tokens, device=device) if call.mask_T is None else call.mask_T.cumsum(0) - 1
    expert_TK = (place_T[:, None] * call.k + torch.arange(call.k, device=device)) % call.num_experts
    expert_N = unmasked(call, token_N, expert_TK.reshape(-1), unused)
    return pack(scores, token_N, expert_N, selector.weigh(call, scores, token_N, expert_N))
