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

    def by_step(self) -> dict[int, int]:
        """The opposite of ``of``."""
        return dict(zip(self.start, self.top_k))

    @property
    def constant(self) -> bool:
        """Whether K never changes."""
        return len(self.start) == 1

    def at(self, step: int) -> int:
        """K at this step."""
        return next(k for start, k in zip(reversed(self.start), reversed(self.top_k)) if step >= start)


def parse(items: tuple[str, ...], top_k: int, num_layers: int, num_experts: int) -> list[Sparsity]:
    """K by step for each MoE layer of a model.

    Args:
        items: as ``"0:8,4,2"`` and ``"500:2"``: from a step on, K of each layer in turn, or one K for all.
        top_k: K where there are no items.
    Fails: UserError for items that do not fit the layers, a step named twice, or as ``Sparsity.of``.
    """
    by_layer: list[dict[int, int]] = [{} for _ in range(num_layers)]
    for item in items or (f"0:{top_k}",):
        step, _, listed = item.partition(":")
        each = [int(k) for k in listed.split(",")]
        each = each * num_layers if len(each) == 1 else each
        require(
            len(each) == num_layers,
            f"sparsity {item!r} names {len(each)} layers, but the model has {num_layers} MoE layers.",
        )
        for layer, k in zip(by_layer, each):
            require(int(step) not in layer, f"sparsity names step {step} twice; name it once.")
            layer[int(step)] = k
    return [Sparsity.of(layer, num_experts) for layer in by_layer]
