"""The tap: losses and counts leave a layer through the backward pass of its combine weights.

An operator sits on ``weight_N``. Forward it only copies. Its backward runs exactly once for each micro-batch that
reaches a loss, whatever happens around it: recomputation repeats forwards, not backwards; evaluation has no backward.
There it adds the statistics to the layer's window and hands each balancing loss its gradient.

It is a custom operator, so that ``torch.compile`` neither looks into it nor reorders its effects away: what must happen
depends on an output that the graph needs.
"""

from typing import Any

import torch
from torch import Tensor

from equipoise.balancing.flat import pack
from equipoise.balancing.recomputation import is_repeated
from equipoise.balancing.window import Window
from equipoise.contracts import Routing

_OPAQUE = (torch.Tag.cudagraph_unsafe,)  # a replayed CUDA graph would skip the host's part


@torch.library.custom_op("equipoise::tap", mutates_args=(), tags=_OPAQUE)
def _tap(
    weight_N: Tensor, anchor: Tensor, carrier: Tensor, count: Tensor, amount: Tensor, key: Tensor, layout: str
) -> tuple[Tensor, Tensor]:
    """A copy of the weights, and a ticket that is spent by the first backward through it."""
    return weight_N.clone(), torch.zeros((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("equipoise::tap_backward", mutates_args=(), tags=_OPAQUE)
def _tap_backward(
    grad_N: Tensor, carrier: Tensor, count: Tensor, amount: Tensor, ticket: Tensor, key: Tensor, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the weights, of the anchor and of the losses' carriers; the window is told on the way."""
    anchor = torch.zeros((), device="cpu")
    if int(ticket) or is_repeated():
        return grad_N.clone(), anchor, torch.zeros_like(carrier)
    ticket.data.fill_(1)  # unseen by autograd and the compiler, to whom it is an ordinary saved tensor
    with torch.no_grad():
        gradient = Window.of(key).record(carrier, count, amount, layout)
    return grad_N.clone(), anchor, gradient.clone() if gradient is carrier else gradient


@_tap.register_fake
def _(weight_N, anchor, carrier, count, amount, key, layout):
    return torch.empty_like(weight_N), torch.empty((), dtype=torch.int64, device="cpu")


@_tap_backward.register_fake
def _(grad_N, carrier, count, amount, ticket, key, layout):
    return torch.empty_like(grad_N), torch.empty((), device="cpu"), torch.empty_like(carrier)


def _remember(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    # Attributes, not saved tensors: these few numbers must not pass through hooks that recompute or offload.
    _, _, carrier, ctx.count, ctx.amount, ctx.key, ctx.layout = inputs
    ctx.carrier, ctx.ticket = carrier.detach(), output[1]


def _backward(ctx: Any, grad_N: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    seen = _tap_backward(grad_N, ctx.carrier, ctx.count, ctx.amount, ctx.ticket, ctx.key, ctx.layout)
    return *seen, None, None, None, None


_tap.register_autograd(_backward, setup_context=_remember)


def tap(window: Window, routing: Routing, losses: dict[str, Tensor], statistics: dict[str, Tensor]) -> Routing:
    """Tie losses and statistics to the backward pass of the routing's weights.

    Args:
        window: the layer's; told in the backward pass.
        losses: carriers by balancer name (see ``Balancer``).
        statistics: additive tensors by name, integers or floating-point numbers.
    Returns:
        The same routing with a fresh ``weight_N``.
    """
    counts = {name: value for name, value in statistics.items() if not value.is_floating_point()}
    amounts = {name: value for name, value in statistics.items() if value.is_floating_point()}
    packed = [pack(losses, routing.weight_N), pack(counts, routing.load_E), pack(amounts, routing.weight_N)]
    (carrier, count, amount), layouts = zip(*packed)
    weight_N, _ = _tap(routing.weight_N, window.anchor, carrier, count, amount, window.key, ";".join(layouts))
    return Routing(routing.token_N, routing.expert_N, weight_N, routing.load_E, routing.dropped_E)
