"""Fully sharded sparse data parallelism: each step the experts that will be busy are materialised on more ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from equipoise.errors import require
from equipoise.parallel.plan import Plan, Transfer, checked, expected_load
from equipoise.parallel.sharing import nearest


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A second materialisation after the router, with the true loads, where it makes the step shorter.

    Source: arXiv 2502.02581. INFERRED: the latency is the busiest rank's rows and the most experts one rank receives.

    Attributes:
        slots: slots of each rank that the first materialisation leaves free.
        row_seconds: computation of a row, forward and backward.
        expert_seconds: time for a rank to receive one expert.
    """

    slots: int
    row_seconds: float
    expert_seconds: float


@dataclass(frozen=True, kw_only=True)
class ShardedSparse:
    """Hecate's planner for fully sharded sparse data parallelism (FSSDP).

    Before the router runs, the experts with the most load in the last iterations are sent to ranks with free slots.
    Rows then stay on their rank, else on their node, where the expert is.

    Source: arXiv 2502.02581, algorithm of materialisation. Differs: the paper leaves the sharing of slots open; ours is
    largest remainder, each expert on a rank at most once (INFERRED); ties go to the lowest id.

    Attributes:
        overlap: experts whose transfer hides behind the rest of the layer (``overlap_degree``); 0 is plain expert
            parallelism.
        slots: foreign experts that a rank has memory for.
        ranks_per_node: ranks of a node, consecutive.
        calibration: materialise once more after the router; None does not.
        rematerialise: free what was received after the forward pass, and send it again before the backward pass.
        window: past iterations whose mean predicts the load.
    """

    overlap: int
    slots: int
    ranks_per_node: int = 8
    calibration: Calibration | None = None
    rematerialise: bool = False
    window: int = 5

    def plan(
        self,
        load_RE: Int[np.ndarray, "R E"],
        owner_E: Int[np.ndarray, " E"],
        history_WE: Int[np.ndarray, "W E"] | None = None,
    ) -> Plan:
        """Plan one step.

        Args:
            load_RE: rows that each rank routes to each expert.
            owner_E: the rank that owns each expert.
            history_WE: rows per expert in past iterations, of which the last ``window`` are read; None lets the
                prediction be this step's own load.
        Fails: UserError for loads, owners and settings that do not fit.
        """
        load_RE, owner_E = checked(load_RE, owner_E)
        require(min(self.overlap, self.slots) >= 0, "overlap and slots must not be negative.")
        require(self.ranks_per_node >= 1, "ranks_per_node must be at least 1.")
        num_ranks, num_experts = load_RE.shape
        predicted_E = expected_load(load_RE, history_WE, self.window)
        overlap = min(self.overlap, num_experts)
        free_R = np.full(num_ranks, min(self.slots, overlap))
        holders = [[owner] for owner in owner_E.tolist()]
        holders = materialise(predicted_E, holders, overlap, free_R, self.ranks_per_node)
        plan = self._plan(load_RE, owner_E, holders)
        if self.calibration is None:
            return plan
        return self._calibrated(load_RE, owner_E, holders, plan, self.calibration)

    def _plan(self, load_RE: np.ndarray, owner_E: np.ndarray, holders: list[list[int]]) -> Plan:
        owners = owner_E.tolist()
        return Plan(
            num_ranks=load_RE.shape[0],
            segments=[nearest(load_RE[:, e].tolist(), ranks, self.ranks_per_node) for e, ranks in enumerate(holders)],
            resident=[[owner] for owner in owners],
            transfers=[Transfer(e, owners[e], r) for e, ranks in enumerate(holders) for r in ranks if r != owners[e]],
            dropped=[0] * len(owners),
            rematerialise=self.rematerialise,
        )

    def _calibrated(
        self,
        load_RE: np.ndarray,
        owner_E: np.ndarray,
        holders: list[list[int]],
        plan: Plan,
        calibration: Calibration,
    ) -> Plan:
        free_R = np.full(load_RE.shape[0], calibration.slots)
        more = materialise(load_RE.sum(0), holders, load_RE.shape[1], free_R, self.ranks_per_node)
        calibrated = self._plan(load_RE, owner_E, more)
        late_R = calibrated.received_R() - plan.received_R()
        before = int(plan.load_R().max()) * calibration.row_seconds
        after = int(calibrated.load_R().max()) * calibration.row_seconds
        return calibrated if after + int(late_R.max()) * calibration.expert_seconds < before else plan


def overlap_degree(other_seconds: float, bandwidth: float, expert_bytes: int) -> int:
    """Experts whose weights can travel while the rest of the layer computes.

    Args:
        other_seconds: time of the layer's computation that is not experts, forward.
        bandwidth: of a rank's slowest link, bytes per second.
        expert_bytes: weights of one expert.
    Fails: UserError for figures that are not positive.
    Source: arXiv 2502.02581. Differs: no.
    """
    require(min(other_seconds, bandwidth, expert_bytes) > 0, "Seconds, bandwidth and expert_bytes must be positive.")
    return math.floor(other_seconds * bandwidth / expert_bytes)


def materialise(
    load_E: Int[np.ndarray, " E"],
    holders: list[list[int]],
    overlap: int,
    free_R: Int[np.ndarray, " R"],
    ranks_per_node: int,
) -> list[list[int]]:
    """Send the ``overlap`` heaviest experts to ranks with free slots; none while no load has been seen.

    Args:
        load_E: the load to expect.
        holders: ranks that hold each expert by now.
        overlap: how many experts may be sent.
        free_R: free slots of each rank.
        ranks_per_node: ranks of a node, consecutive.
    Returns:
        the ranks that hold each expert afterwards, ascending.
    """
    if not load_E.any():
        return holders
    num_ranks = len(free_R)
    free_R = free_R.copy()
    holders = [list(ranks) for ranks in holders]
    top = np.argsort(-load_E, kind="stable")[:overlap].tolist()
    absent = [num_ranks - len(holders[expert]) for expert in top]
    fits = overlap <= int(free_R.min())
    wanted = absent if fits else _share_slots(load_E[top].tolist(), absent, int(free_R.sum()))
    for expert, replicas in zip(top, wanted):
        for _ in range(replicas):
            rank = _roomiest(free_R, holders[expert], ranks_per_node)
            if rank is None:
                break
            holders[expert].append(rank)
            free_R[rank] -= 1
    return [sorted(ranks) for ranks in holders]


def _share_slots(loads: list[int], most: list[int], slots: int) -> list[int]:
    """Slots in proportion to the loads by largest remainder, none above its ``most``; ties to the first."""
    total = sum(loads)
    shares = [min(load * slots // total, limit) for load, limit in zip(loads, most)]
    order = sorted(range(len(loads)), key=lambda index: (-(loads[index] * slots % total), index))
    left = slots - sum(shares)
    while left:
        open_ = [index for index in order if shares[index] < most[index] and loads[index]][:left]
        if not open_:
            break
        for index in open_:
            shares[index] += 1
        left -= len(open_)
    return shares


def _roomiest(free_R: Int[np.ndarray, " R"], holders: list[int], ranks_per_node: int) -> int | None:
    """The rank for one more replica: on a node without one, with the most free slots; then the roomiest rank there."""
    open_R = free_R.copy()
    open_R[holders] = 0
    starts = np.arange(0, len(free_R), ranks_per_node)
    open_N = np.maximum.reduceat(open_R, starts) > 0
    if not open_N.any():
        return None
    free_N = np.add.reduceat(free_R, starts)
    free_N[np.array(holders) // ranks_per_node] -= free_R.sum()  # behind every node without a replica
    start = int(starts[np.where(open_N, free_N, np.iinfo(np.int64).min).argmax()])
    return start + int(open_R[start : start + ranks_per_node].argmax())
