"""What policies would cost on a cluster: the real planners, a modelled machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from equipoise.diagnosis.trace import Trace
from equipoise.errors import require
from equipoise.parallel import contiguous_owners
from equipoise.simulator.cluster import Cluster, read_cluster
from equipoise.simulator.cost import CostModel, LayerCost, Planner, Policy
from equipoise.simulator.network import Network
from equipoise.simulator.policies import POLICIES, build_policies
from equipoise.simulator.shape import Shape, find_shape
from equipoise.simulator.tally import Outcome, tally
from equipoise.simulator.workload import check_fits, parse_workload, rank_loads

LARGEST_GROUP = 384


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is simulated besides source, cluster and policies.

    Attributes:
        shape: the model's sizes, or the name of a known one.
        ep: ranks of an expert-parallel group; None: the most that divide the cluster, up to the number of experts.
        tokens: of a rank and step.
        training: with backward pass, gradients and optimizer state; False: forward only.
        windows: of a made-up workload; the first is only history for the others.
        seed: of a made-up workload.
    """

    shape: Shape | str = "deepseek-v3"
    ep: int | None = None
    tokens: int = 8192
    training: bool = True
    windows: int = 2
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What was simulated, and what came of it. Every figure is simulated.

    Attributes:
        source: the workload, or where the trace came from.
        cluster: the machines.
        settings: with the shape and the group's size filled in.
        outcomes: by policy; the first is what the others are measured against.
    """

    source: str
    cluster: Cluster
    settings: Settings
    outcomes: dict[str, Outcome]

    @property
    def shape(self) -> Shape:
        """The model's sizes."""
        assert isinstance(self.settings.shape, Shape)
        return self.settings.shape

    @property
    def replicas(self) -> int:
        """Groups of ranks, each with all experts."""
        assert self.settings.ep is not None
        return self.cluster.num_ranks // self.settings.ep

    def speedup(self, name: str) -> float:
        """How many times faster than the first policy."""
        return next(iter(self.outcomes.values())).seconds / self.outcomes[name].seconds


def simulate(
    source: Trace | str,
    cluster: Cluster | str,
    policies: str | Sequence[str] | Mapping[str, Policy | Planner] = POLICIES,
    settings: Settings | None = None,
    progress: Callable[[str], None] | None = None,
) -> Simulation:
    """Simulate policies on a cluster.

    All groups of ranks see the same loads, so that one of them is simulated. All ranks of a group route alike. Planners
    that decide ahead see the windows before the one they are measured on.

    Args:
        source: a trace, or a workload such as ``zipf:1.2``, ``hot:0.5:4`` or ``balanced``.
        cluster: machines, or a known machine and ranks such as ``h200x8:16``.
        policies: names, with commas or as a sequence, or planners by a name of one's own.
        settings: sizes; None for the defaults.
        progress: called with a policy's name after each of its layers.
    Fails: UserError for names that are unknown, ranks that do not divide, and a trace that does not fit.
    """
    cluster = read_cluster(cluster) if isinstance(cluster, str) else cluster
    settings = _resolved(settings or Settings(), cluster)
    shape, ep = settings.shape, settings.ep
    assert isinstance(shape, Shape)
    assert ep is not None
    if isinstance(source, str):
        trace = parse_workload(source, shape, settings.windows, settings.seed)
        words = source
    else:
        trace, words = source, str(source.about.get("source", "trace"))
    check_fits(trace, shape, ep)
    model = CostModel(cluster, Network(cluster, ep), shape, settings.tokens, settings.training)
    outcomes = {
        name: _outcome(model, policy, trace, cluster.num_ranks // ep, lambda name=name: progress and progress(name))
        for name, policy in build_policies(policies, model).items()
    }
    return Simulation(source=words, cluster=cluster, settings=settings, outcomes=outcomes)


def layers_to_simulate(source: Trace | str, settings: Settings) -> int:
    """How many times ``progress`` will be called for each policy."""
    if isinstance(source, Trace):
        windows, layers, _ = source.load_WLE.shape
    else:
        shape = settings.shape if isinstance(settings.shape, Shape) else find_shape(settings.shape)
        windows, layers = settings.windows, shape.num_layers
    return max(windows - 1, 1) * layers


def _resolved(settings: Settings, cluster: Cluster) -> Settings:
    shape = find_shape(settings.shape) if isinstance(settings.shape, str) else settings.shape
    require(settings.tokens >= 1, f"tokens must be at least 1, not {settings.tokens}.")
    require(settings.windows >= 1, f"windows must be at least 1, not {settings.windows}.")
    ranks, most = cluster.num_ranks, min(cluster.num_ranks, shape.num_experts, LARGEST_GROUP)
    sizes = [size for size in range(1, most + 1) if ranks % size == 0]
    ep = sizes[-1] if settings.ep is None else settings.ep
    require(ep >= 1, f"ep must be at least 1, not {ep}.")
    closest = min(sizes, key=lambda size: abs(size - ep))
    divides = ranks % ep == 0
    require(
        divides, f"Groups of {ep} ranks do not divide the cluster's {ranks}; the nearest size that does: {closest}."
    )
    return replace(settings, shape=shape, ep=ep)


def _outcome(model: CostModel, policy: Policy, trace: Trace, replicas: int, done: Callable[[], object]) -> Outcome:
    windows, layers, experts = trace.load_WLE.shape
    ranks = model.network.num_ranks
    owner_E = contiguous_owners(experts, ranks)
    rows = ranks * model.tokens * model.shape.top_k
    first = min(1, windows - 1)
    costs_WL: list[list[LayerCost]] = []
    spare = False
    for window in range(first, windows):
        costs_WL.append([])
        for layer in range(layers):
            load_RE = rank_loads(trace.load_WLE[window, layer], rows, ranks)
            history_WE = _history(trace.load_WLE[:window, layer], rows) if window else None
            plan = policy.planner.plan(load_RE, owner_E, history_WE)
            spare = spare or plan.rematerialise
            costs_WL[-1].append(model.layer(policy, plan, load_RE))
            done()
    return tally(model, costs_WL, replicas, policy.ahead and first == 0, spare)


def _history(load_WE: np.ndarray, rows: int) -> Int[np.ndarray, "W E"]:
    """Past loads as whole rows, in the sizes of the cluster's steps: a trace may hold shares."""
    return np.rint(load_WE * (rows * len(load_WE) / load_WE.sum())).astype(np.int64)
