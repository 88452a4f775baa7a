"""One hook in place of the selector: routing replay, forced balance, and tests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from equipoise.balancing.balanced import balanced_layers
from equipoise.contracts import Call, Routing, Scores, Selector, UserError
from equipoise.routing.rows import pack, unmasked

Hook = Callable[[Call, Scores, Selector], Routing]


@contextmanager
def override(model: nn.Module, hook: Hook | dict[str, Hook]) -> Iterator[None]:
    """Let ``hook`` choose the rows of every MoE layer of ``model`` inside the block.

    Args:
        hook: one for all layers, or one per layer name.
    Fails: UserError for a name that is no MoE layer's.
    """
    layers = balanced_layers(model)
    hooks = hook if isinstance(hook, dict) else dict.fromkeys(layers, hook)
    unknown = sorted(set(hooks) - set(layers))
    if unknown:
        raise UserError(f"No MoE layer is called {unknown[0]!r}; the layers are {', '.join(layers)}.")
    before = {name: layers[name].override for name in hooks}
    try:
        for name, chosen in hooks.items():
            layers[name].override = chosen
        yield
    finally:
        for name, previous in before.items():
            layers[name].override = previous


def replay(recorded: Routing) -> Hook:
    """Route as ``recorded``, with weights read from the live gate, so that the router keeps its gradient."""

    def hook(call: Call, scores: Scores, selector: Selector) -> Routing:
        weight_N = selector.weigh(call, scores, recorded.token_N, recorded.expert_N)
        return Routing(recorded.token_N, recorded.expert_N, weight_N, recorded.load_E, recorded.dropped_E)

    return hook


def forced_balance(call: Call, scores: Scores, selector: Selector) -> Routing:
    """Deal the experts out in turn: loads differ by one row at most, whatever the scores (for measuring speed)."""
    num_tokens, num_experts = scores.gate_TE.shape
    device = scores.gate_TE.device
    token_N = torch.arange(num_tokens, device=device).repeat_interleave(call.k)
    place_T = torch.arange(num_tokens, device=device) if call.mask_T is None else call.mask_T.cumsum(0) - 1
    expert_TK = (place_T[:, None] * call.k + torch.arange(call.k, device=device)) % num_experts
    expert_N = unmasked(call, token_N, expert_TK.reshape(-1), num_experts)
    return pack(scores, token_N, expert_N, selector.weigh(call, scores, token_N, expert_N))
