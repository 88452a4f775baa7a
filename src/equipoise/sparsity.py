"""How many experts a token gets, from which step on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from equipoise.errors import require


@dataclass(frozen=True)
class Sparsity:
    """K by step: constant, or a schedule of one layer.

    Source: Sigma-MoE-Tiny (2512.16248), progressive sparsification; its own list is not published. Differs: K
    changes at a step of the same run, where the authors' code restarts with another list.

    Attributes:
        start: the step that each K holds from, ascending from 0.
        top_k: K from that step on.
    """

    start: tuple[int, ...]
    top_k: tuple[int, ...]

    @classmethod
    def of(cls, top_k: int | Mapping[int, int], num_experts: int) -> Sparsity:
        """From K, or from K by step as ``{0: 8, 1000: 1}``.

        Fails: UserError unless every K lies between 1 and E, and the first holds from step 0.
        """
        by_step = dict(top_k) if isinstance(top_k, Mapping) else {0: top_k}
        whole = all(type(number) is int for pair in by_step.items() for number in pair)
        starts = tuple(sorted(by_step)) if whole else ()
        require(
            bool(starts) and starts[0] == 0,
            f"top_k={top_k!r} must be a whole number, or whole numbers by step from step 0 on, as {{0: 8, 1000: 1}}.",
        )
        for k in by_step.values():
            require(1 <= k <= num_experts, f"top_k={k!r} must lie between 1 and num_experts={num_experts}.")
        return cls(starts, tuple(by_step[start] for start in starts))

    @property
    def constant(self) -> bool:
        """Whether K never changes."""
        return len(self.start) == 1

    def at(self, step: int) -> int:
        """K at this step."""
        return next(k for start, k in zip(reversed(self.start), reversed(self.top_k)) if step >= start)
