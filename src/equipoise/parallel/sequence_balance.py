"""Sequences of very different lengths, spread so that all ranks have equal work: ByteScale's scheduler."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from equipoise.errors import require
from equipoise.parallel.schedule import MicroBatch, Piece, Schedule


@dataclass(frozen=True, kw_only=True)
class SequenceCost:
    """Time of a sequence of s tokens: ``quadratic * s**2 + linear * s + constant``; fit it to measured times.

    Attention is the quadratic term, everything that works token by token (the experts among it) the linear one.
    Source: arXiv 2502.21231. Differs: no.
    """

    quadratic: float
    linear: float
    constant: float = 0.0

    def __post_init__(self) -> None:
        """Fails: UserError for terms that are negative."""
        require(min(self.quadratic, self.linear, self.constant) >= 0, "The terms of a cost must not be negative.")

    def seconds(self, length: int) -> float:
        """Time of one sequence."""
        return self.quadratic * length * length + self.linear * length + self.constant

    @staticmethod
    def even(length_B: Int[np.ndarray, " B"]) -> SequenceCost:
        """Attention and tokens weigh the same over these sequences; in units of their mean. INFERRED: our default."""
        squares, tokens = sum(int(length) ** 2 for length in length_B), int(length_B.sum())
        require(tokens > 0, "There are no tokens to balance.")
        return SequenceCost(quadratic=len(length_B) / (2 * squares), linear=len(length_B) / (2 * tokens))


class _Unit(NamedTuple):
    """What is handed out whole: a pack of short sequences, or a long one as one piece per rank."""

    length: int  # of its longest sequence
    parts: list[MicroBatch]


@dataclass(frozen=True, kw_only=True)
class SequenceBalance:
    """Spreads a global batch over ranks.

    A sequence longer than the capacity is cut into pieces on several ranks, which compute it together (ring attention).
    Shorter ones are packed best-fit; a pack's sequences do not attend to one another. From the longest to the shortest,
    each goes to the ranks with the least work so far. Ranks may get different numbers of micro-batches; within a group
    of ranks that exchange rows of experts they get equal numbers, if need be empty ones, because each all-to-all waits
    for the whole group.

    Source: arXiv 2502.21231, balance scheduler (data part). Differs: always the least-loaded ranks, with which the
    paper's tolerance has no effect; no offloading, so a sequence of s tokens takes ceil(s / capacity) ranks. INFERRED:
    in ``"pp"`` mode rank r prefers bucket r mod ``buckets``; expert groups are ours.

    Attributes:
        num_ranks: data-parallel ranks (data x context).
        capacity: tokens that a rank can hold in one micro-batch.
        cost: time of a sequence; None for ``SequenceCost.even`` of the batch.
        mode: ``"dp"``: ranks work on equal lengths at the same time. ``"pp"``: a pipeline keeps to one level of length.
        buckets: levels of length for ``"pp"``, with equal work each.
        expert_groups: the ranks of each expert group; None for one group of all ranks. Groups of one rank each pad
            nothing.
    """

    num_ranks: int
    capacity: int
    cost: SequenceCost | None = None
    mode: Literal["dp", "pp"] = "dp"
    buckets: int = 8
    expert_groups: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        """Fails: UserError for settings that make no sense."""
        require(
            min(self.num_ranks, self.capacity, self.buckets) >= 1, "Ranks, capacity and buckets must be at least 1."
        )
        require(self.mode in ("dp", "pp"), "mode must be 'dp' or 'pp'.")
        members = sorted(rank for group in self.groups() for rank in group)
        require(members == list(range(self.num_ranks)), "expert_groups must hold every rank exactly once.")

    def groups(self) -> list[list[int]]:
        """The expert groups as lists."""
        everyone = [range(self.num_ranks)] if self.expert_groups is None else self.expert_groups
        return [list(group) for group in everyone]

    def schedule(self, length_B: Int[np.ndarray, " B"]) -> Schedule:
        """Spread a global batch.

        Args:
            length_B: tokens of each sequence.
        Returns:
            the micro-batches of every rank.
        Fails: UserError for a sequence without tokens or one that all ranks together cannot hold.
        """
        lengths = length_B.tolist()
        require(all(length >= 1 for length in lengths), "Every sequence must have at least one token.")
        longest = max(lengths, default=0)
        room = self.num_ranks * self.capacity
        require(longest <= room, f"A sequence of {longest} tokens exceeds the {room} that all ranks hold together.")
        if not lengths:
            return Schedule([[] for _ in range(self.num_ranks)])
        cost = self.cost or SequenceCost.even(length_B)
        order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
        units = [self._shard(index, lengths[index], cost) for index in order if lengths[index] > self.capacity]
        units += self._packs([(index, lengths[index]) for index in order if lengths[index] <= self.capacity], cost)
        return Schedule(self._lay_out(self._assign(units)))

    def _shard(self, sequence: int, length: int, cost: SequenceCost) -> _Unit:
        count = -(-length // self.capacity)
        ends = [length * part // count for part in range(count + 1)]
        squares, seconds = length * length / count, cost.seconds(length) / count
        pieces = [Piece(sequence, start, end) for start, end in pairwise(ends)]
        return _Unit(length, [MicroBatch([piece], piece.end - piece.start, squares, seconds) for piece in pieces])

    def _packs(self, sequences: list[tuple[int, int]], cost: SequenceCost) -> list[_Unit]:
        """Best fit, from the longest on: into the fullest pack that still has room."""
        packs: list[list[tuple[int, int]]] = []
        room: list[tuple[int, int]] = []  # free tokens and pack, ascending
        for index, length in sequences:
            found = bisect_left(room, (length, 0))
            free, pack = room.pop(found) if found < len(room) else (self.capacity, len(packs))
            packs[pack:] = packs[pack:] or [[]]
            packs[pack].append((index, length))
            insort(room, (free - length, pack))
        return [_pack(pack, cost) for pack in packs]

    def _assign(self, units: list[_Unit]) -> list[tuple[_Unit, list[int]]]:
        """Each unit to the ranks with the least work, from the longest on."""
        work = [(0.0, rank) for rank in range(self.num_ranks)]  # a heap
        assigned = []
        buckets = _cut(units, self.buckets if self.mode == "pp" else 1)
        while any(buckets):
            laggard = work[0][1]
            turns = ((laggard + step) % len(buckets) for step in range(len(buckets)))
            unit = next(buckets[turn] for turn in turns if buckets[turn]).popleft()
            least = [heappop(work) for _ in unit.parts]
            for (seconds, rank), part in zip(least, unit.parts):
                heappush(work, (seconds + part.seconds, rank))
            assigned.append((unit, [rank for _, rank in least]))
        return assigned

    def _lay_out(self, assigned: list[tuple[_Unit, list[int]]]) -> list[list[MicroBatch]]:
        """Pieces of one sequence stand in the same step; packs fill the other steps, the heaviest first."""
        steps: list[dict[int, MicroBatch]] = [{} for _ in range(self.num_ranks)]
        for unit, ranks in sorted(assigned, key=lambda item: (-len(item[1]), -item[0].parts[0].seconds)):
            step = 0
            while any(step in steps[rank] for rank in ranks):
                step += 1
            for rank, part in zip(ranks, unit.parts):
                steps[rank][step] = part
        empty = MicroBatch([], 0, 0.0, 0.0)
        counts = [max(taken, default=-1) + 1 for taken in steps]
        for group in self.groups():
            most = max(counts[rank] for rank in group)
            for rank in group:
                counts[rank] = most
        return [[taken.get(step, empty) for step in range(count)] for taken, count in zip(steps, counts)]


def _pack(sequences: list[tuple[int, int]], cost: SequenceCost) -> _Unit:
    lengths = [length for _, length in sequences]
    squares, seconds = float(sum(length * length for length in lengths)), sum(map(cost.seconds, lengths))
    pieces = [Piece(index, 0, length) for index, length in sequences]
    return _Unit(max(lengths), [MicroBatch(pieces, sum(lengths), squares, seconds)])


def _cut(units: list[_Unit], count: int) -> list[deque[_Unit]]:
    """Buckets of about equal work, in order."""
    work = [sum(part.seconds for part in unit.parts) for unit in units]
    middle = np.cumsum(work) - np.array(work) / 2
    buckets: list[deque[_Unit]] = [deque() for _ in range(count)]
    for unit, position in zip(units, (middle / sum(work) * count).astype(int).tolist()):
        buckets[position].append(unit)
    return buckets


@dataclass(frozen=True, kw_only=True, eq=False)
class BalancedBatches:
    """A batch sampler: shuffles a data set's sequences into global batches and schedules each.

    Iterating yields the ``Schedule`` of every global batch, the same on all ranks.

    Attributes:
        length_B: tokens of every sequence of the data set.
        batch_size: sequences in a global batch; the last batch may have fewer.
        balance: the scheduler.
        seed: of the shuffling.
        epoch: another one is another order.
    """

    length_B: Int[np.ndarray, " B"]
    batch_size: int
    balance: SequenceBalance
    seed: int = 0
    epoch: int = 0

    def __iter__(self) -> Iterator[Schedule]:
        """Schedules whose pieces name sequences of the data set. Fails: UserError as ``SequenceBalance.schedule``."""
        require(self.batch_size >= 1, "batch_size must be at least 1.")
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.length_B))
        for start in range(0, len(order), self.batch_size):
            index_B = order[start : start + self.batch_size]
            yield self.balance.schedule(self.length_B[index_B]).renamed(index_B.tolist())

    def rank_batches(self, rank: int) -> Iterator[list[Piece]]:
        """One rank's micro-batches over all global batches: what a torch ``DataLoader`` takes as ``batch_sampler``.

        A data set is then indexed by ``Piece``, and its ``collate_fn`` must take an empty list.
        """
        require(0 <= rank < self.balance.num_ranks, f"Rank {rank} is not one of {self.balance.num_ranks}.")
        for schedule in self:
            yield from (micro_batch.pieces for micro_batch in schedule.micro_batches[rank])
