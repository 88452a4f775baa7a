"""What cannot be placed, and what is wrong with a placement: said before anything is moved."""

from __future__ import annotations

from typing import get_args

from equipoise.diagnosis.trace import Trace
from equipoise.errors import require
from equipoise.placement.placement import Placement
from equipoise.placement.settings import Objective, Settings, Solver


def check_counts(num_experts: int, devices: int, nodes: int, replicas: int, groups: int) -> int:
    """Slots per device.

    Fails: UserError for counts that do not divide, and for more replicas than can be without two on one device.
    """
    counts = {"devices": devices, "nodes": nodes, "groups": groups}
    for name, count in counts.items():
        require(count > 0, f"{name} must be above 0, not {count}.")
    require(replicas >= 0, f"replicas must be at least 0, not {replicas}.")
    require(devices % nodes == 0, f"{devices} devices do not divide over {nodes} nodes; choose a multiple.")
    require(num_experts % groups == 0, f"{num_experts} experts do not divide into {groups} groups; choose a divisor.")
    slots, rest = divmod(num_experts + replicas, devices)
    more, fewer = replicas + (devices - rest), replicas - rest
    fitting = f"{fewer} or {more}" if fewer >= 0 else f"{more}"
    require(
        rest == 0,
        f"{num_experts} experts and {replicas} replicas do not divide over {devices} devices; take {fitting} replicas.",
    )
    return slots


def check_request(
    trace: Trace, devices: int, nodes: int, replicas: int, groups: int, solver: Solver, settings: Settings
) -> int:
    """Slots per device.

    Fails: UserError for the first thing that cannot be, and what would be possible instead.
    """
    for name, value, known in (("solver", solver, Solver), ("objective", settings.objective, Objective)):
        require(value in get_args(known), f"There is no {name} {value!r}; there are {', '.join(get_args(known))}.")
    slots = check_counts(trace.num_experts, devices, nodes, replicas, groups)
    if solver != "eplb":
        _check_rules(trace.num_experts, devices, nodes, slots, groups)
    _check_memory(trace, devices, slots, settings)
    _check_purpose(trace, nodes, replicas, groups, solver, settings)
    present = settings.current
    if present is not None:
        shape = (len(present.physical_to_logical), present.num_experts, present.devices)
        wanted = (len(trace.layers), trace.num_experts, devices)
        require(
            shape == wanted,
            f"The present placement has {shape[0]} layers, {shape[1]} experts and {shape[2]} devices, the new one "
            f"{wanted[0]}, {wanted[1]} and {wanted[2]}; leave it out where they differ.",
        )
    for name in ("windows", "seconds", "inter_node"):
        require(getattr(settings, name) > 0, f"{name} must be above 0, not {getattr(settings, name)}.")
    for name in ("slack", "rounds"):
        require(getattr(settings, name) >= 0, f"{name} must be at least 0, not {getattr(settings, name)}.")
    return slots


def complaints(placement: Placement, expert_bytes: int | None = None, memory_bytes: int | None = None) -> list[str]:
    """What is wrong with a placement that may be executed all the same: doubled copies, and memory that is exceeded."""
    found = []
    layers, experts = (placement.copy_LEG.sum(2) < placement.copies_LE).nonzero()
    if len(layers):
        found.append(
            f"{len(layers)} times a device holds two copies of one expert, first of expert {experts[0]} in layer "
            f"{layers[0]}; the second uses memory and balances nothing."
        )
    size = expert_bytes or placement.expert_bytes
    if size is not None and memory_bytes is not None:
        needed = placement.slots * len(placement.physical_to_logical) * size
        if needed > memory_bytes:
            found.append(f"Every device holds {needed:,} bytes of experts and has {memory_bytes:,}.")
    return found


def _check_rules(num_experts: int, devices: int, nodes: int, slots: int, groups: int) -> None:
    require(
        groups == 1 or groups % nodes == 0,
        f"{groups} groups do not divide over {nodes} nodes; choose a multiple, or 1.",
    )
    within = num_experts // (nodes if groups > 1 else 1)
    where = "its node's groups have" if groups > 1 else "there are"
    require(
        slots <= within,
        f"A device would hold {slots} experts, and {where} only {within}: two copies on one device balance nothing. "
        f"Take at most {within * devices - num_experts} replicas.",
    )


def _check_memory(trace: Trace, devices: int, slots: int, settings: Settings) -> None:
    if settings.memory_bytes is None:
        return
    size = settings.expert_bytes or trace.expert_bytes or 0
    require(size > 0, "To keep within the memory, the size of an expert is needed; give expert_bytes.")
    needed = slots * len(trace.layers) * size
    most = settings.memory_bytes // (len(trace.layers) * size) * devices - trace.num_experts
    advice = f"take at most {most} replicas" if most >= 0 else "take more devices"
    require(
        needed <= settings.memory_bytes,
        f"Each device would hold {needed:,} bytes of experts ({slots} in each layer), and has "
        f"{settings.memory_bytes:,}; {advice}.",
    )


def _check_purpose(trace: Trace, nodes: int, replicas: int, groups: int, solver: Solver, settings: Settings) -> None:
    objective = settings.objective
    if solver in ("eplb", "moetuner"):
        require(objective == "balance", f"Solver {solver} has its own purpose; leave objective at balance.")
    if solver == "moetuner" or objective == "affinity":
        known = trace.transition_MEE is not None and trace.transition_MEE.any()
        need = "Solver moetuner" if solver == "moetuner" else "Objective affinity"
        require(bool(known), f"{need} needs transitions between layers, and the trace has none; record single tokens.")
    if objective == "coactivation":
        known = trace.coactivation_LEE is not None and trace.coactivation_LEE.any()
        require(bool(known), "Objective coactivation needs tokens with several experts each; record single tokens.")
        require(nodes > 1, "Objective coactivation is about nodes; give more than one.")
    if solver == "moetuner" or objective != "balance":
        what = "Solver moetuner" if solver == "moetuner" else f"Objective {objective}"
        require(groups == 1, f"{what} and groups cannot be combined; leave groups at 1.")
    require(solver != "moetuner" or replicas == 0, "Solver moetuner knows no replicas; take 0, or another solver.")
