"""Least-loaded expert parallelism: an overloaded rank's rows spill to the ranks with the most room."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np
from jaxtyping import Int

from equipoise.errors import require
from equipoise.parallel.native import native_plan
from equipoise.parallel.plan import Plan, Segment, Transfer, append_rows, checked

_CLOSED = np.iinfo(np.int64).max  # a load that no rank reaches: never the least


@dataclass(frozen=True, kw_only=True)
class LeastLoaded:
    """Least-Loaded Expert Parallelism (LLEP).

    Experts are handed out from the heaviest to the lightest. The owner keeps what fits under the capacity
    ``ceil(alpha * rows / ranks)``, counting what it still has to get of its lighter experts; the rest goes in chunks to
    the rank with the least load, and the expert's weights travel with it.

    Source: arXiv 2601.17111 and its reference code. Differs: the capacity is rounded up (the code rounds down); the
    threshold is held against the loads of ranks (as in the code; the paper's pseudocode: of experts); helpers are
    sorted anew after every chunk (as in the paper; not in the code for an expert that leaves its owner whole); two
    chunk sizes, ``overflow="spread"``, ``max_rows`` and ``max_foreign`` are ours.

    Attributes:
        alpha: capacity in units of the mean load, at least 1.
        min_rows: the smallest chunk worth a helper's multiplication (``break_even_rows``); a pair is (within a node,
            between nodes), and needs ``ranks_per_node``.
        threshold: below this max/mean load of ranks the plan is plain expert parallelism.
        overflow: where no helper takes a chunk, ``"helper"`` gives all that is left to the least-loaded other rank, and
            lets a last chunk be smaller than ``min_rows`` (the paper's pseudocode and code); ``"native"`` leaves it
            with the owner and never sends less than ``min_rows`` (the paper's text); ``"spread"`` (ours) gives
            ``min_rows`` at a time to the least-loaded other rank, so that no rank exceeds the capacity by as much.
        ranks_per_node: ranks of a node, consecutive; None for one node.
        max_rows: rows that a rank has memory for. It is kept whatever the other settings say; what finds no place is
            dropped and counted: the rows beyond R * max_rows, and more where ``max_foreign`` bars the way.
        max_foreign: foreign experts that a rank has memory for.
    """

    window: int = field(default=0, init=False, repr=False)

    alpha: float = 1.0
    min_rows: int | tuple[int, int] = 1024
    threshold: float = 1.3
    overflow: Literal["helper", "native", "spread"] = "helper"
    ranks_per_node: int | None = None
    max_rows: int | None = None
    max_foreign: int | None = None

    def __post_init__(self) -> None:
        """Fails: UserError for settings that make no sense."""
        require(self.alpha >= 1 and math.isfinite(self.alpha), "alpha must be at least 1: less cannot hold all rows.")
        require(self.threshold >= 0 and math.isfinite(self.threshold), "threshold must be finite and not negative.")
        require(min(self.chunks()) >= 1, "min_rows must be at least 1.")
        paired = isinstance(self.min_rows, tuple)
        require(not paired or self.ranks_per_node is not None, "A pair of min_rows needs ranks_per_node.")
        near, far = self.chunks()
        require(near <= far, "min_rows between nodes must not be less than within a node.")
        known = self.overflow in ("helper", "native", "spread")
        require(known, "overflow must be 'helper', 'native' or 'spread'.")
        require(self.ranks_per_node is None or self.ranks_per_node >= 1, "ranks_per_node must be at least 1.")
        require(self.max_rows is None or self.max_rows >= 0, "max_rows must not be negative.")
        require(self.max_foreign is None or self.max_foreign >= 0, "max_foreign must not be negative.")

    def plan(
        self,
        load_RE: Int[np.ndarray, "R E"],
        owner_E: Int[np.ndarray, " E"],
        history_WE: Int[np.ndarray, "W E"] | None = None,
    ) -> Plan:
        """Plan one step; ``history_WE`` is not read. Fails: UserError for loads and owners that do not fit."""
        load_RE, owner_E = checked(load_RE, owner_E)
        load_E, num_ranks = load_RE.sum(0), load_RE.shape[0]
        total_R = np.zeros(num_ranks, dtype=np.int64)
        np.add.at(total_R, owner_E, load_E)
        if self._even_enough(total_R):
            return native_plan(load_E, owner_E, num_ranks)
        spilling = _Spilling(self, total_R, self.capacity(int(load_E.sum()), num_ranks))
        owners, loads = owner_E.tolist(), load_E.tolist()
        segments: list[list[Segment]] = [[] for _ in owners]
        dropped = [0] * len(owners)
        for expert in np.argsort(-load_E, kind="stable").tolist():
            segments[expert], dropped[expert] = spilling.hand_out(expert, loads[expert], owners[expert])
        return Plan(num_ranks, segments, [[owner] for owner in owners], sorted(spilling.transfers), dropped)

    def capacity(self, rows: int, num_ranks: int) -> int:
        """Rows up to which a rank is filled; exact for the decimal that ``alpha`` was written as."""
        capacity = math.ceil(Fraction(str(float(self.alpha))) * rows / num_ranks)
        return capacity if self.max_rows is None else min(capacity, self.max_rows)

    def chunks(self) -> tuple[int, int]:
        """The smallest chunk within a node and between nodes."""
        return self.min_rows if isinstance(self.min_rows, tuple) else (self.min_rows, self.min_rows)

    def _even_enough(self, total_R: Int[np.ndarray, " R"]) -> bool:
        busiest, rows = int(total_R.max()), int(total_R.sum())
        fits = self.max_rows is None or busiest <= self.max_rows
        return fits and (rows == 0 or busiest * len(total_R) < Fraction(str(float(self.threshold))) * rows)


class _Spilling:
    """The ranks' loads while experts are handed out."""

    def __init__(self, policy: LeastLoaded, total_R: Int[np.ndarray, " R"], capacity: int):
        self.policy = policy
        self.capacity = capacity
        self.total_R = total_R  # rows assigned to a rank, and those of its own experts still to be handed out
        self.closed_R = np.full(len(total_R), policy.max_foreign == 0)  # has no memory for one more foreign expert
        self.foreign_R = np.zeros_like(total_R)
        self.helpers: list[int] = []  # of the expert at hand
        self.transfers: list[Transfer] = []

    def hand_out(self, expert: int, rows: int, home: int) -> tuple[list[Segment], int]:
        """One expert's segments, and how many of its rows found no place."""
        segments: list[Segment] = []
        self.helpers = []
        others = int(self.total_R[home]) - rows
        kept = min(max(self.capacity - others, 0), rows)
        self.total_R[home] = others
        self._give(segments, expert, home, home, kept)
        left = rows - kept
        while left:
            rank, chunk = self._helper(home, left)
            if not chunk:
                rank, chunk = self._last_resort(home, left)
            if not chunk:
                break
            self._give(segments, expert, home, rank, chunk)
            left -= chunk
        return segments, left

    def _give(self, segments: list[Segment], expert: int, home: int, rank: int, rows: int) -> None:
        append_rows(segments, rank, segments[-1].end if segments else 0, rows)
        self.total_R[rank] += rows
        if rank == home or rank in self.helpers:
            return
        self.helpers.append(rank)
        self.transfers.append(Transfer(expert, home, rank))
        self.foreign_R[rank] += 1
        self.closed_R[rank] = self.foreign_R[rank] == self.policy.max_foreign

    def _others(self, home: int) -> Int[np.ndarray, " R"]:
        """Loads of the ranks that may help; the others look full."""
        load_R = np.where(self.closed_R, _CLOSED, self.total_R)
        load_R[self.helpers] = self.total_R[self.helpers]
        load_R[home] = _CLOSED
        return load_R

    def _helper(self, home: int, left: int) -> tuple[int, int]:
        """The least-loaded rank that takes a chunk, and the chunk; no rows where none does.

        Ranks with more load have less room: none but the least-loaded of all, and of the node, can be first to accept.
        """
        load_R = self._others(home)
        size = self.policy.ranks_per_node or len(load_R)
        node = range(home - home % size, home - home % size + size)
        near = node.start + int(load_R[node.start : node.stop].argmin())
        for rank in (int(load_R.argmin()), near):
            chunk = min(left, self.capacity - int(load_R[rank]))
            least = self.policy.chunks()[rank not in node]
            whole = chunk == left and self.policy.overflow != "native"
            if chunk >= least or (whole and chunk > 0):
                return rank, chunk
        return home, 0

    def _last_resort(self, home: int, left: int) -> tuple[int, int]:
        """Where rows go that no helper takes: beyond the capacity, but never beyond ``max_rows``."""
        load_R = self._others(home)
        other = int(load_R.argmin())
        loads = [(other, int(load_R[other])), (home, int(self.total_R[home]))]
        if self.policy.overflow == "native":
            loads.reverse()
        for rank, load in loads:
            chunk = min(left, max(self.policy.chunks())) if self.policy.overflow == "spread" else left
            if self.policy.max_rows is not None:
                chunk = min(chunk, self.policy.max_rows - load)
            if load != _CLOSED and chunk > 0:
                return rank, chunk
        return home, 0


def break_even_rows(flops: float, bandwidth: float, value_bytes: int = 2, training: bool = True) -> int:
    """Rows from which on multiplying a SwiGLU expert elsewhere takes longer than sending its weights there.

    The expert's width and hidden width cancel out. In training its gradient travels back, and a row costs three times
    the multiplications.

    Args:
        flops: a rank's floating-point operations per second, as measured.
        bandwidth: of the link, bytes per second.
        value_bytes: bytes of a weight.
        training: count the backward pass.
    Fails: UserError for figures that are not positive.
    Source: INFERRED from the cost of both; the paper uses 1024 throughout.
    """
    require(min(flops, bandwidth, value_bytes) > 0, "flops, bandwidth and value_bytes must be positive.")
    return math.ceil(value_bytes * flops / ((3 if training else 2) * bandwidth))
