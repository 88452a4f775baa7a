"""What can be asked of a placement beyond balance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from equipoise.placement.placement import Placement

Solver = Literal["auto", "exact", "cp_sat", "pack", "eplb", "moetuner"]
Objective = Literal["balance", "affinity", "coactivation"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What can be asked for beyond balance."""

    objective: Objective = "balance"
    """balance alone; affinity: then little traffic between layers; coactivation: then a token's experts on one node."""
    slack: float = 0.02
    """Balance that may be given up for traffic, relatively."""
    inter_node: float = 8.0
    """Cost of a token's way between nodes, where the way within a node costs 1."""
    windows: int = 16
    """Windows to plan for; if there are more, neighbours are merged."""
    seconds: float = 3.0
    """Time that an exact solver has for a layer; auto gives all layers together at most that of ten."""
    rounds: int = 10
    """Shaken starts of the local search."""
    seed: int = 0
    """Seed of the shaking."""
    expert_bytes: int | None = None
    """Size of one expert's weights; the trace's own if not given."""
    memory_bytes: int | None = None
    """What a device has for the experts' weights of all layers."""
    current: Placement | None = None
    """The present placement; experts in order if not given."""
    show_progress: bool = False
    """Draw a progress bar on standard error."""
