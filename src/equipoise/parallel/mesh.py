"""MoE Parallel Folding: attention and experts cut the same ranks into groups of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from equipoise.errors import require

ATTENTION = ("tp", "cp", "dp", "pp")
EXPERTS = ("etp", "ep", "edp", "pp")


@dataclass(frozen=True, kw_only=True)
class Folding:
    """How attention (tp, cp, dp, pp) and experts (etp, ep, edp, pp) share ``num_ranks`` ranks.

    Ranks count with the first axis fastest and the pipeline slowest, so that both sides have the same pipeline stages
    whatever their other sizes are. Data-parallel sizes follow from the others.

    Fails: UserError for sizes whose product does not divide the ranks.
    Source: arXiv 2504.14960 and Megatron-Core. Differs: the paper's listing has data parallelism slowest, which agrees
    on the pipeline only for some sizes, and reads ``tp`` where the experts' ``etp`` is meant; we follow Megatron-Core.

    Attributes:
        num_ranks: all ranks.
        tp: tensor-parallel size of attention.
        cp: context-parallel size.
        pp: pipeline stages.
        etp: tensor-parallel size of an expert.
        ep: expert-parallel size.
    """

    num_ranks: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    etp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        """Fails: UserError for sizes whose product does not divide the ranks."""
        sizes = (self.num_ranks, self.tp, self.cp, self.pp, self.etp, self.ep)
        require(min(sizes) >= 1, "Every size must be at least 1.")
        attention, experts = self.tp * self.cp * self.pp, self.etp * self.ep * self.pp
        require(self.num_ranks % attention == 0, f"{self.num_ranks} ranks do not divide by tp * cp * pp = {attention}.")
        require(self.num_ranks % experts == 0, f"{self.num_ranks} ranks do not divide by etp * ep * pp = {experts}.")

    @property
    def dp(self) -> int:
        """Data-parallel size of attention."""
        return self.num_ranks // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data-parallel size of experts: ranks that hold the same expert."""
        return self.num_ranks // (self.etp * self.ep * self.pp)

    def groups(self, *axes: str) -> Int[np.ndarray, "groups size"]:
        """The groups of ranks that differ along these axes only; a group counts with the first axis fastest.

        Args:
            axes: of attention (``tp cp dp pp``) or of experts (``etp ep edp pp``), not of both.
        Fails: UserError for axes that do not exist or do not belong together.
        """
        side = ATTENTION if set(axes) <= set(ATTENTION) else EXPERTS
        known = set(axes) <= set(side) and 0 < len(axes) == len(set(axes))
        require(known, f"Groups run along {ATTENTION} or along {EXPERTS}, each axis once, but got {axes}.")
        rank = np.arange(self.num_ranks).reshape([getattr(self, axis) for axis in reversed(side)])
        last = range(-1, -1 - len(axes), -1)
        rank = np.moveaxis(rank, [-1 - side.index(axis) for axis in axes], list(last))
        size = int(np.prod([getattr(self, axis) for axis in axes]))
        return rank.reshape(-1, size)

    def coordinates(self, rank: int) -> dict[str, int]:
        """A rank's place along all seven axes. Fails: UserError for a rank that does not exist."""
        require(0 <= rank < self.num_ranks, f"Rank {rank} is not one of {self.num_ranks}.")
        place: dict[str, int] = {}
        for side in (ATTENTION, EXPERTS):
            left = rank
            for axis in side:
                left, place[axis] = divmod(left, getattr(self, axis))
        return place


def foldings(num_ranks: int) -> Iterator[Folding]:
    """Every legal folding of the ranks. Fails: UserError for less than one rank."""
    require(num_ranks >= 1, "There must be at least one rank.")
    for pp in _divisors(num_ranks):
        stage = num_ranks // pp
        pairs = [(inner, outer) for inner in _divisors(stage) for outer in _divisors(stage // inner)]
        for tp, cp in pairs:
            for etp, ep in pairs:
                yield Folding(num_ranks=num_ranks, tp=tp, cp=cp, pp=pp, etp=etp, ep=ep)


def dispatch_bytes(
    folding: Folding,
    dispatcher: Literal["alltoall", "allgather", "flex"],
    tokens: int,
    k: int,
    dim: int,
    value_bytes: int = 2,
) -> float:
    """Bytes that one rank receives in one layer's forward pass, dispatch and combine together, under even routing.

    ``alltoall`` moves a row per expert choice over ``ep``, then gathers over ``etp``; ``allgather`` moves every token
    to every rank of etp * ep, whatever ``k`` is; ``flex`` (DeepEP) moves a token once to every rank that computes it.

    Args:
        folding: the sizes.
        dispatcher: one of the three.
        tokens: of one rank, after attention has split them.
        k: experts per token.
        dim: width of the model.
        value_bytes: bytes of an activation.
    Fails: UserError for an unknown dispatcher or sizes that are not positive.
    Source: arXiv 2504.14960 for the algorithms; the volumes are INFERRED from them. ``flex`` takes a token's choices as
    independent and even over the ranks: it meets ep * (1 - (1 - 1/ep)^k) of them.
    """
    require(min(tokens, k, dim, value_bytes) >= 1, "tokens, k, dim and value_bytes must be at least 1.")
    ep, etp = folding.ep, folding.etp
    met = ep * (1 - (1 - 1 / ep) ** k)
    copies = {
        "alltoall": k * ((ep - 1) / ep + etp - 1),
        "allgather": etp * ep - 1,
        "flex": met * (etp - 1 / ep),
    }
    require(dispatcher in copies, f"Unknown dispatcher {dispatcher!r}; choose one of {', '.join(copies)}.")
    return 2.0 * tokens * dim * value_bytes * copies[dispatcher]


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
