"""The policies by name, with settings that suit the cluster and the shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from equipoise.errors import require
from equipoise.nearest import nearest
from equipoise.parallel import (
    LeastLoaded,
    Native,
    Replicas,
    Shadow,
    ShardedSparse,
    break_even_rows,
    overlap_degree,
)
from equipoise.simulator.cost import CostModel, Planner, Policy

SLOTS = 4  # foreign experts that sharded-sparse keeps room for on every rank
MIN_ROWS = 1024  # LLEP's


def _native(model: CostModel) -> Policy:
    return Policy(planner=Native())


def _placed(model: CostModel) -> Policy:
    return Policy(planner=Replicas(num_slots=_slots(model, 0)))


def _replicas(model: CostModel) -> Policy:
    return Policy(planner=Replicas(num_slots=_slots(model, 1)))


def _slots(model: CostModel, more: int) -> int:
    """Slots for every expert, filled up so that ranks have equally many, and so many more per rank."""
    ranks = model.network.num_ranks
    return model.shape.num_experts + -model.shape.num_experts % ranks + more * ranks


def _least_loaded(model: CostModel) -> Policy:
    """Within a node as published. Between nodes chunks must be so large that none may fit: what is left is spread."""
    cluster, ranks = model.cluster, model.network.num_ranks
    if ranks <= cluster.ranks_per_node:
        return Policy(planner=LeastLoaded(min_rows=MIN_ROWS))
    software = cluster.software
    speed = cluster.flops * software.efficiency
    near, far = (
        break_even_rows(speed, bandwidth * software.weight_efficiency, model.shape.value_bytes, model.training)
        for bandwidth in (cluster.links[0].bandwidth, cluster.far_bandwidth)
    )
    pair = (min(near, far), max(near, far))
    return Policy(planner=LeastLoaded(min_rows=pair, ranks_per_node=cluster.ranks_per_node, overflow="spread"))


def _sharded_sparse(model: CostModel) -> Policy:
    """An expert is handed on within a node, so it enters each node once: what counts is the node's bandwidth."""
    far = model.network.num_ranks > model.cluster.ranks_per_node
    bandwidth = _bandwidth(model) * (model.cluster.ranks_per_node if far else 1)
    seconds = model.attention_seconds
    overlap = overlap_degree(seconds, bandwidth, model.shape.expert_bytes) if seconds > 0 else 0
    planner = ShardedSparse(overlap=overlap, slots=SLOTS, ranks_per_node=model.cluster.ranks_per_node)
    return Policy(planner=planner, broadcast=True)


def _shadow(model: CostModel) -> Policy:
    planner = Shadow(
        dim=model.shape.dim,
        hidden_dim=model.shape.hidden_dim,
        bandwidth=_bandwidth(model),
        flops=model.cluster.flops * model.cluster.software.efficiency,
        matrices=3,
        value_bytes=model.shape.value_bytes,
    )
    return Policy(planner=planner, broadcast=True)


def _bandwidth(model: CostModel) -> float:
    """What a rank reaches on the slowest link within its group."""
    near = model.network.num_ranks <= model.cluster.ranks_per_node
    bandwidth = model.cluster.links[0].bandwidth if near else model.cluster.far_bandwidth
    return bandwidth * model.cluster.software.weight_efficiency


_BUILDERS: Mapping[str, Callable[[CostModel], Policy]] = {
    "native": _native,
    "placed": _placed,
    "replicas": _replicas,
    "least-loaded": _least_loaded,
    "sharded-sparse": _sharded_sparse,
    "shadow": _shadow,
}
POLICIES = tuple(_BUILDERS)


def build_policies(given: str | Sequence[str] | Mapping[str, Policy | Planner], model: CostModel) -> dict[str, Policy]:
    """Policies from names (a string has commas between them), or planners by a name of one's own.

    ``placed`` places experts by past loads without replicas, ``replicas`` with one more expert per rank.

    Fails: UserError for an unknown name, with the nearest, a name given twice, and no policy at all.
    """
    if isinstance(given, Mapping):
        made = {name: item if isinstance(item, Policy) else Policy(planner=item) for name, item in given.items()}
    else:
        names = [name.strip() for name in given.split(",")] if isinstance(given, str) else list(given)
        for name in names:
            wrong = f"Unknown policy {name!r}{nearest(name, POLICIES)}; there are {', '.join(POLICIES)}."
            require(name in _BUILDERS, wrong)
            require(names.count(name) == 1, f"Policy {name} is given twice.")
        made = {name: _BUILDERS[name](model) for name in names}
    require(bool(made), f"Give a policy: {', '.join(POLICIES)}.")
    return made
