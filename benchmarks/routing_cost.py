"""What each method's routing costs beyond plain top-k, as a share of the whole layer's forward and backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from cases import ROUTING, ROUTING_TOKENS
from measure import interleaved, ratio

import equipoise as eq

PLAIN = "unbalanced"


def routing(rounds: int) -> dict[str, Any]:
    """Score, adjust, select, losses, statistics, their backward pass and the update of the state; no expert computes.

    Every method takes turns with plain top-k and with the whole layer. A share is (method - plain top-k) / layer, pair
    by pair; plain top-k against itself shows the spread that a true share of 0 has on this machine.
    """
    found = {}
    for method in eq.METHODS:
        candidates = {"method": _step(method), "plain": _step(PLAIN), "layer": _step(PLAIN, experts=True)}
        seconds = interleaved(candidates, rounds)
        extra = [ours - plain for ours, plain in zip(seconds["method"], seconds["plain"])]
        found[method] = {"share_of_layer": ratio(extra, seconds["layer"]), "seconds": seconds}
    return {"sizes": ROUTING | {"tokens": ROUTING_TOKENS}, "methods": found}


def _step(method: str, experts: bool = False) -> Callable[[], None]:
    """Forward, backward and the update of one layer."""
    torch.manual_seed(0)
    layer = eq.MoE(**ROUTING, method=method)
    if not experts:
        layer.experts.forward = lambda x, routing: x * routing.weight_N.sum()
    handle = eq.attach(layer, [])
    x = torch.randn(ROUTING_TOKENS, ROUTING["dim"], requires_grad=True)

    def step() -> None:
        handle.follow(layer(x).square().mean()).backward()
        handle.step()
        layer.zero_grad()
        x.grad = None

    return step
