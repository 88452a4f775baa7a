"""What a sequence scheduler decides: the micro-batches of every rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from equipoise.errors import require


class Piece(NamedTuple):
    """Tokens ``start`` to ``end`` (excluded) of a sequence."""

    sequence: int
    start: int
    end: int


class MicroBatch(NamedTuple):
    """What a rank computes at once.

    Attributes:
        pieces: whole sequences, which do not attend to one another, or one piece of a sequence shared with other ranks.
        tokens: of all pieces.
        attention: attention's work in squared tokens; ranks that share a sequence share its square equally.
        seconds: modelled time.
    """

    pieces: list[Piece]
    tokens: int
    attention: float
    seconds: float


@dataclass(frozen=True)
class Schedule:
    """The micro-batches of every rank, in the order in which they run: ``micro_batches[rank][step]``.

    Ranks hold different numbers of tokens, so losses are sums over tokens, divided by ``tokens_R().sum()``.
    """

    micro_batches: list[list[MicroBatch]]

    def tokens_R(self) -> Int[np.ndarray, " R"]:
        """Tokens of each rank."""
        return np.array([sum(batch.tokens for batch in steps) for steps in self.micro_batches], dtype=np.int64)

    def attention_R(self) -> Float[np.ndarray, " R"]:
        """Attention's work of each rank, in squared tokens."""
        return np.array([sum(batch.attention for batch in steps) for steps in self.micro_batches], dtype=np.float64)

    def seconds_R(self) -> Float[np.ndarray, " R"]:
        """Modelled time of each rank, without waiting for others."""
        return np.array([sum(batch.seconds for batch in steps) for steps in self.micro_batches], dtype=np.float64)

    def renamed(self, index: list[int]) -> Schedule:
        """The same schedule for sequence ``index[i]`` instead of ``i``."""
        return Schedule(
            [
                [
                    batch._replace(pieces=[piece._replace(sequence=index[piece.sequence]) for piece in batch.pieces])
                    for batch in steps
                ]
                for steps in self.micro_batches
            ]
        )

    def check(self, length_B: Int[np.ndarray, " B"], capacity: int, expert_groups: Sequence[Sequence[int]]) -> None:
        """Hold the schedule against the batch it was made for.

        Args:
            length_B: tokens of each sequence.
            capacity: tokens that a rank can hold in one micro-batch.
            expert_groups: ranks that exchange rows of experts in every micro-batch.
        Fails: UserError for tokens that are lost or doubled, a micro-batch above the capacity, pieces of one sequence
            on the same rank or in different steps, and unequal numbers of micro-batches in an expert group, which would
            wait for one another forever.
        """
        found: dict[int, list[tuple[Piece, int, int]]] = defaultdict(list)
        for rank, steps in enumerate(self.micro_batches):
            for step, batch in enumerate(steps):
                tokens = sum(piece.end - piece.start for piece in batch.pieces)
                require(tokens == batch.tokens <= capacity, f"Rank {rank}, step {step}: {tokens} tokens do not fit.")
                for piece in batch.pieces:
                    found[piece.sequence].append((piece, rank, step))
        require(found.keys() <= set(range(len(length_B))), "The schedule names sequences that do not exist.")
        for sequence, length in enumerate(length_B.tolist()):
            _check_sequence(sequence, length, sorted(found[sequence]))
        for group in expert_groups:
            counts = {len(self.micro_batches[rank]) for rank in group}
            require(len(counts) == 1, f"Ranks {list(group)} share experts but have {sorted(counts)} micro-batches.")


def _check_sequence(sequence: int, length: int, found: list[tuple[Piece, int, int]]) -> None:
    position = 0
    for piece, _, _ in found:
        require(piece.start == position < piece.end, f"Sequence {sequence} is lost or doubled at token {position}.")
        position = piece.end
    require(position == length, f"Sequence {sequence} has {length} tokens, of which {position} are scheduled.")
    apart = len({rank for _, rank, _ in found}) == len(found) and len({step for _, _, step in found}) == 1
    require(apart, f"The pieces of sequence {sequence} must stand on different ranks in the same step.")
