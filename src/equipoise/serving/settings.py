"""What DualMap can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from equipoise.errors import require


@dataclass(frozen=True, kw_only=True)
class DualMapSettings:
    """Defaults are those of DualMap's release (arXiv 2602.06502), unless marked INFERRED."""

    slo: float = 5.0
    """Wanted time to first token, s."""
    prefill_seconds: float = 1.6e-4
    """Time per prompt token that a replica must compute."""
    slo_fraction: float = 0.5
    """Share of the SLO that waiting prompt tokens may take before the nearer of the two caches is given up."""
    rebalance_multiple: float = 1.0
    """A replica is overloaded above so many times that many tokens: 1 (original) or 2 (a fork)."""
    in_flight: int = 1
    """Prompts that a replica is sent before it has finished one; the others wait here, where they can be moved."""
    fresh_seconds: float = 2.0
    """More than one prompt is sent only to a replica that finished one within this time."""
    max_wait: float = 3.0
    """A replica whose oldest request waits so long is overloaded, and sends that request first (INFERRED)."""
    allow_neighbor: bool = False
    """Move requests also to a third replica when the pair is overloaded (the code does; the paper does not)."""
    migration: Literal["greedy", "batch"] = "greedy"
    """Rank the moves anew after each (the code), or once per round (the paper)."""
    window: int = 200
    """Latest requests that decide how much of a prompt is its key."""
    seed: int = 0
    """Seed of the choice between two equal replicas."""

    def __post_init__(self) -> None:
        """Fails: UserError at the first value that is not allowed."""
        for name in ("prefill_seconds", "rebalance_multiple", "in_flight", "max_wait", "window"):
            require(getattr(self, name) > 0, f"{name} must be above 0, not {getattr(self, name)}.")
        for name in ("slo", "slo_fraction", "fresh_seconds"):
            require(getattr(self, name) >= 0, f"{name} must be at least 0, not {getattr(self, name)}.")
        require(self.migration in ("greedy", "batch"), f"migration is greedy or batch, not {self.migration!r}.")

    @property
    def route_limit(self) -> float:
        """Tokens up to which a replica is within the SLO; 15,625 by default."""
        return self.slo_fraction * self.slo / self.prefill_seconds

    @property
    def overload_limit(self) -> float:
        """Tokens above which a replica is overloaded."""
        return self.rebalance_multiple * self.route_limit
