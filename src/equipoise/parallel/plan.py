"""The plan: which rank computes which rows of which expert, and which weights travel for it.

Rows of expert ``e`` are counted in the global order: first those of rank 0, then those of rank 1, and so on, each
rank's in its own order. Every way to spread experts is a *planner* that writes this one record. With expert tensor
parallelism a "rank" is the group of ranks that share one expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from equipoise.errors import require


class Segment(NamedTuple):
    """Rows ``start`` to ``end`` (excluded) of one expert, in the global order, are computed by ``rank``."""

    rank: int
    start: int
    end: int


class Transfer(NamedTuple):
    """The weights of ``expert`` travel from ``source`` to ``destination``; in training their gradient travels back."""

    expert: int
    source: int
    destination: int


@dataclass(frozen=True)
class Plan:
    """Who computes which rows, for one layer and one step; the same on every rank.

    Attributes:
        num_ranks: R.
        segments: per expert, its rows' segments in ascending order. A rank may have several of one expert.
        resident: per expert, the ranks that hold it before the step.
        transfers: the weights that are sent for this step; no rank gets an expert twice, or one that it holds.
        dropped: per expert, its rows that are in no segment: nobody computes them.
        rematerialise: received weights are freed after the forward pass and sent again before the backward pass.
    """

    num_ranks: int
    segments: list[list[Segment]]
    resident: list[list[int]]
    transfers: list[Transfer]
    dropped: list[int]
    rematerialise: bool = False

    def load_R(self) -> Int[np.ndarray, " R"]:
        """Rows that each rank computes."""
        load_R = np.zeros(self.num_ranks, dtype=np.int64)
        for segments in self.segments:
            for rank, start, end in segments:
                load_R[rank] += end - start
        return load_R

    def imbalance(self) -> float:
        """The busiest rank's rows over the mean rank's; 1 is balanced, and so is a step without rows."""
        load_R = self.load_R()
        return float(load_R.max() / load_R.mean()) if load_R.any() else 1.0

    def rows_RS(self, load_RE: Int[np.ndarray, "R E"]) -> Int[np.ndarray, "R S"]:
        """Rows that each source rank gives to each of the S segments, which count by expert, then by position."""
        flat = [(expert, start, end) for expert, ends in enumerate(self.segments) for _, start, end in ends]
        expert_S, start_S, end_S = np.array(flat, dtype=np.int64).reshape(-1, 3).T
        stop_RS = load_RE.cumsum(0, dtype=np.int64)[:, expert_S]
        first_RS = stop_RS - load_RE[:, expert_S]
        return np.maximum(np.minimum(stop_RS, end_S) - np.maximum(first_RS, start_S), 0)

    def traffic_RR(self, load_RE: Int[np.ndarray, "R E"]) -> Int[np.ndarray, "R R"]:
        """Rows from each source rank (first axis) to each computing rank; rows on the diagonal do not travel."""
        rank_S = [segment.rank for segments in self.segments for segment in segments]
        traffic_RR = np.zeros((self.num_ranks, self.num_ranks), dtype=np.int64)
        np.add.at(traffic_RR.T, rank_S, self.rows_RS(load_RE).T)
        return traffic_RR

    def received_R(self) -> Int[np.ndarray, " R"]:
        """Experts whose weights each rank receives for this step."""
        return np.bincount([transfer.destination for transfer in self.transfers], minlength=self.num_ranks)

    def bytes_R(self, row_bytes: int, expert_bytes: int) -> Int[np.ndarray, " R"]:
        """Memory of each rank in bytes: its rows at ``row_bytes`` and the experts it holds or receives.

        A rank's two slots with the same expert count once: a plan knows ranks, not slots.
        """
        held_R = np.bincount([rank for ranks in self.resident for rank in ranks], minlength=self.num_ranks)
        return self.load_R() * row_bytes + (held_R + self.received_R()) * expert_bytes

    def check(self, load_RE: Int[np.ndarray, "R E"]) -> None:
        """Hold the plan against the loads it was made for.

        Fails: UserError for a row that is computed twice or lost uncounted, a rank that computes an expert it neither
        holds nor receives, a transfer from a rank without the expert, and an expert that nobody holds or that one rank
        gets twice.
        """
        shape = (self.num_ranks, len(self.segments))
        require(load_RE.shape == shape, f"The plan is for [R, E] = {list(shape)}, the load is {list(load_RE.shape)}.")
        require(
            len(self.resident) == len(self.dropped) == len(self.segments),
            "A plan lists segments, resident ranks and dropped rows once for every expert.",
        )
        for expert, rows in enumerate(load_RE.sum(0).tolist()):
            self._check_rows(expert, rows)
        self._check_weights()

    def _check_rows(self, expert: int, rows: int) -> None:
        position, left_out = 0, 0
        for rank, start, end in self.segments[expert]:
            require(0 <= rank < self.num_ranks, f"Expert {expert} has a segment on rank {rank}, which does not exist.")
            require(
                position <= start < end <= rows, f"Expert {expert}: segment {start}-{end} overlaps or leaves the rows."
            )
            left_out += start - position
            position = end
        left_out += rows - position
        require(
            left_out == self.dropped[expert],
            f"Expert {expert}: {left_out} rows are in no segment, but {self.dropped[expert]} are counted as dropped.",
        )

    def _check_weights(self) -> None:
        present = [set(ranks) for ranks in self.resident]
        for expert, ranks in enumerate(self.resident):
            require(
                len(present[expert]) == len(ranks) > 0, f"Expert {expert} must be resident, once per rank: {ranks}."
            )
            require(
                present[expert] <= set(range(self.num_ranks)),
                f"Expert {expert} is resident outside the ranks: {ranks}.",
            )
        for expert, source, destination in self.transfers:
            where = f"Expert {expert}, transfer from rank {source} to {destination}"
            require(0 <= expert < len(present), f"{where}: there is no such expert.")
            require(0 <= destination < self.num_ranks, f"{where}: there is no such rank.")
            require(source in self.resident[expert], f"{where}: the source does not hold it.")
            require(destination not in present[expert], f"{where}: the destination has it already.")
            present[expert].add(destination)
        for expert, segments in enumerate(self.segments):
            strangers = {segment.rank for segment in segments} - present[expert]
            require(not strangers, f"Ranks {sorted(strangers)} compute expert {expert} without its weights.")


@runtime_checkable
class Planner(Protocol):
    """Makes plans; two ranks that give it the same loads get the same plan.

    ``window`` is how many past iterations it wants to see; 0 for none.
    """

    @property
    def window(self) -> int:
        """Past iterations that ``history_WE`` should hold."""
        ...

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
            history_WE: rows per expert in past iterations, oldest first, for planners that must decide before the
                router; None lets them see this step's own load (perfect foresight).
        """
        ...


def contiguous_owners(num_experts: int, num_ranks: int) -> Int[np.ndarray, " E"]:
    """Owners in plain expert parallelism: equal blocks in order; where they cannot be equal they differ by one.

    Fails: UserError for less than one expert or rank.
    """
    require(num_experts > 0 and num_ranks > 0, "Experts and ranks must be at least 1 each.")
    return np.arange(num_experts, dtype=np.int64) * num_ranks // num_experts


def checked(load_RE: np.ndarray, owner_E: np.ndarray) -> tuple[Int[np.ndarray, "R E"], Int[np.ndarray, " E"]]:
    """A planner's input as int64.

    Fails: UserError for shapes that do not fit, counts that are no integers or negative, and owners that are no rank.
    """
    whole = np.issubdtype(load_RE.dtype, np.integer) and np.issubdtype(owner_E.dtype, np.integer)
    require(whole, f"load_RE and owner_E must be integers, but are {load_RE.dtype} and {owner_E.dtype}.")
    require(
        load_RE.ndim == 2 and load_RE.size > 0, f"load_RE must be [ranks, experts], but it is {list(load_RE.shape)}."
    )
    num_ranks, num_experts = load_RE.shape
    require(
        owner_E.shape == (num_experts,), f"owner_E must name {num_experts} owners, but it is {list(owner_E.shape)}."
    )
    require(int(load_RE.min()) >= 0, "load_RE must not be negative.")
    in_range = int(owner_E.min()) >= 0 and int(owner_E.max()) < num_ranks
    require(in_range, f"owner_E must lie between 0 and {num_ranks - 1}.")
    return load_RE.astype(np.int64), owner_E.astype(np.int64)


def expected_load(load_RE: Int[np.ndarray, "R E"], history_WE: np.ndarray | None, window: int) -> Int[np.ndarray, " E"]:
    """Rows per expert over the last ``window`` iterations; without a history, this step's own.

    Fails: UserError for a window without iterations and a history of other experts.
    """
    require(window >= 1, "window must be at least 1.")
    if history_WE is None:
        return load_RE.sum(0)
    num_experts = load_RE.shape[1]
    fits = history_WE.ndim == 2 and history_WE.shape[1] == num_experts
    require(fits, f"history_WE must be [iterations, {num_experts}], but it is {list(history_WE.shape)}.")
    return history_WE[-window:].sum(0)


def append_rows(segments: list[Segment], rank: int, start: int, rows: int) -> None:
    """Give the rows from ``start`` on to ``rank``; a last segment that is the rank's already gets longer."""
    if segments and segments[-1].rank == rank and segments[-1].end == start:
        segments[-1] = Segment(rank, segments[-1].start, start + rows)
    elif rows > 0:
        segments.append(Segment(rank, start, start + rows))
