"""A simulation as a table and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float
from rich import box
from rich.table import Table

from equipoise.simulator.cost import PHASES
from equipoise.simulator.simulation import Simulation
from equipoise.simulator.tally import TRAFFIC, Outcome

BLOCKS = 64  # ranks, or blocks of them, that pictures and JSON tell apart

Facts = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of the table: heading, how a policy's facts read in it, and what that means."""

    title: str
    cell: Callable[[Facts], str]
    meaning: str


COLUMNS = (
    Column("step, ms", lambda facts: f"{1e3 * facts['seconds']:,.1f}", "Simulated time of a step, all layers."),
    Column("speed-up", lambda facts: f"{facts['speedup']:.2f}", "Over the first policy."),
    Column("max/mean", lambda facts: f"{facts['imbalance']:.2f}", "The busiest rank's rows over the mean rank's."),
    Column("waits", lambda facts: f"{facts['waiting']:.0%}", "Share of the time that ranks wait for the slowest."),
    Column(
        "weights, ms",
        lambda facts: f"{1e3 * (facts['phases']['weights'] + facts['phases']['gradients']):,.1f}",
        "Time for weights and their gradients that nothing hides.",
    ),
    Column("far, GB", lambda facts: f"{_far(facts):.1f}", "Traffic per rank and step beyond the nearest link."),
    Column(
        "GB",
        lambda facts: f"{facts['peak_gb']:.0f}" + ("" if facts["fits"] else "!"),
        "Experts and their rows on the fullest rank; ! where that exceeds its memory.",
    ),
)


def facts(simulation: Simulation) -> Facts:
    """Everything as JSON. Every figure is simulated."""
    settings = simulation.settings
    cluster = asdict(simulation.cluster)
    return {
        "label": "simulated",
        "source": simulation.source,
        "cluster": cluster,
        "settings": asdict(settings) | {"replicas": simulation.replicas},
        "phases": list(PHASES),
        "policies": {name: _policy_facts(simulation, name) for name in simulation.outcomes},
    }


def table(found: Facts) -> Table:
    """The policies as a rich table."""
    fits = all(policy["fits"] for policy in found["policies"].values())
    caption = f"Simulated.{'' if fits else ' ! exceeds the memory of a rank.'}"
    shown = Table("policy", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), caption=caption)
    for column in COLUMNS:
        shown.add_column(column.title, justify="right")
    for name, policy in found["policies"].items():
        shown.add_row(name, *(column.cell(policy) for column in COLUMNS))
    return shown


def headline(found: Facts) -> str:
    """Which policy is the fastest."""
    policies = found["policies"]
    first, best = next(iter(policies)), min(policies, key=lambda name: policies[name]["seconds"])
    if best == first:
        return f"None of the policies is faster than {first} here (simulated)."
    gain, time = policies[best]["speedup"], 1e3 * policies[best]["seconds"]
    return f"{best} is the fastest: {time:,.0f} ms per step, {gain:.2f} times as fast as {first} (simulated)."


def blocks(values: Float[np.ndarray, "... R"]) -> Float[np.ndarray, "... B"]:
    """Means over blocks of consecutive ranks along the last axis, at most ``BLOCKS`` of them."""
    edges = block_edges(values.shape[-1])
    return np.add.reduceat(values, edges[:-1], axis=-1) / np.diff(edges)


def block_edges(num_ranks: int) -> np.ndarray:
    """Where the blocks begin, and the end of the last."""
    count = min(num_ranks, BLOCKS)
    return np.arange(count + 1) * num_ranks // count


def block_names(num_ranks: int) -> list[str]:
    """What each block is called: a rank, or its first and last."""
    edges = block_edges(num_ranks)
    return [str(a) if b - a == 1 else f"{a}-{b - 1}" for a, b in pairwise(edges.tolist())]


def _policy_facts(simulation: Simulation, name: str) -> Facts:
    outcome: Outcome = simulation.outcomes[name]
    ranks = outcome.waiting_RR.shape[0]
    links = [link.name for link in simulation.cluster.links]
    peak = float(outcome.peak_bytes_R.max())
    return {
        "seconds": outcome.seconds,
        "speedup": simulation.speedup(name),
        "phases": dict(zip(PHASES, outcome.phase_seconds_P.tolist())),
        "own_seconds": dict(zip(PHASES, blocks(outcome.own_PR).tolist())),
        "waiting": outcome.waiting,
        "waits_for": blocks(blocks(outcome.waiting_RR).T).T.tolist(),
        "ranks": block_names(ranks),
        "imbalance": outcome.imbalance,
        "worst_imbalance": outcome.worst_imbalance,
        "gb_per_rank": {
            kind: dict(zip(links, (sent_L / ranks / 1e9).tolist())) for kind, sent_L in zip(TRAFFIC, outcome.bytes_KL)
        },
        "peak_gb": peak / 1e9,
        "fits": peak <= simulation.cluster.memory,
        "dropped_rows": outcome.dropped,
        "transfers": outcome.transfers,
        "foresight": outcome.foresight,
        "timeline": [
            {"phase": phase.name, "backward": phase.backward, "seconds": blocks(phase.seconds_R).tolist()}
            | {"until": float(phase.seconds_R.max())}
            for phase in outcome.timeline
        ],
    }


def _far(policy: Facts) -> float:
    """GB per rank beyond the first link: what goes farther than the second passes its port as well."""
    amounts = [list(by_link.values()) for by_link in policy["gb_per_rank"].values()]
    return sum(by_link[1] for by_link in amounts if len(by_link) > 1)
