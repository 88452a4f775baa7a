"""What each method's routing costs beyond plain top-k, as a share of the whole layer's forward and backward pass."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from cases import ROUTING, ROUTING_TOKENS
from measure import interleaved, ratio

import equipoise as eq

PLAIN = "unbalanced"
NOTES = """The goal was 2 % for methods that route every token by itself, and 10 % for solvers. Above it: `erc`, whose
cost, E^2 pairs of experts, does not depend on the tokens and so weighs most where there are few (it is published as 0.2
to 0.8 % of far larger batches); `importance_load`, whose noise needs a second product as large as the router's, and
random numbers; and `token_rounding`, which sorts every expert's column. `selective_sinkhorn` is timed with its default
of one plan in a hundred steps.
"""


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


def page(found: dict[str, Any]) -> str:
    """The result as docs/evidence/routing_cost.md."""
    result, where = found["result"], found["environment"]
    sizes = ", ".join(f"{name}={size}" for name, size in result["sizes"].items())
    lines = [
        "# What routing costs",
        "",
        "Time of each method's routing beyond plain top-k (scores, choice, losses, statistics, their backward pass and",
        "the update of the state), as a share of the whole layer's forward and backward pass. Method, plain top-k and",
        "layer take turns in one process; the share is taken pair by pair. Plain top-k against itself (`unbalanced`)",
        "shows what a true share of 0 looks like here. Made by",
        "",
        "    python benchmarks/run.py routing",
        "",
        f"at {sizes}, fp32, on {where['threads']} thread of {where['cpu']}, torch {where['torch']},",
        f"{where['date']}, commit {(where['commit'] or '')[:10]}.",
        "",
        "| method | share of the layer, median | quartiles | routing, ms | plain top-k, ms | layer, ms |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, case in result["methods"].items():
        share, times = case["share_of_layer"], case["seconds"]
        ms = [f"{1000 * statistics.median(times[each]):.1f}" for each in ("method", "plain", "layer")]
        quartiles = f"{share['quartile_1']:.1%} to {share['quartile_3']:.1%}"
        lines.append(f"| `{name}` | {share['median']:.1%} | {quartiles} | {' | '.join(ms)} |")
    return "\n".join([*lines, "", NOTES])


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
