"""Equipoise keeps the experts of a sparse Mixture-of-Experts evenly used.

Names are loaded when they are first asked for: planning, placing and serving need no torch, and do not wait for it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from equipoise.errors import UserError

if TYPE_CHECKING:
    from equipoise.balancing.attach import Handle, attach
    from equipoise.balancing.load_stats import LoadStats, load_stats
    from equipoise.building import Method
    from equipoise.contracts import Call, NonFiniteError, Routing, Scores
    from equipoise.experts.pool import share_experts
    from equipoise.methods import METHODS
    from equipoise.moe import MoE
    from equipoise.placement.solve import place
    from equipoise.routing.denoising import denoising
    from equipoise.routing.override import forced_balance, override, replay
    from equipoise.scaling.fit import fit_scaling_law
    from equipoise.simulator.simulation import simulate
    from equipoise.soft_moe import SoftMoE

__version__ = "0.1.0"
_HOMES = {
    "equipoise.balancing.attach": ("Handle", "attach"),
    "equipoise.balancing.load_stats": ("LoadStats", "load_stats"),
    "equipoise.contracts": ("Call", "NonFiniteError", "Routing", "Scores"),
    "equipoise.building": ("Method",),
    "equipoise.experts.pool": ("share_experts",),
    "equipoise.methods": ("METHODS",),
    "equipoise.placement.solve": ("place",),
    "equipoise.moe": ("MoE",),
    "equipoise.routing.denoising": ("denoising",),
    "equipoise.routing.override": ("forced_balance", "override", "replay"),
    "equipoise.scaling.fit": ("fit_scaling_law",),
    "equipoise.simulator.simulation": ("simulate",),
    "equipoise.soft_moe": ("SoftMoE",),
}
_PACKAGES = {"parallel", "scaling", "serving", "simulator"}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [
    "METHODS",
    "Call",
    "Handle",
    "LoadStats",
    "Method",
    "MoE",
    "NonFiniteError",
    "Routing",
    "Scores",
    "SoftMoE",
    "UserError",
    "attach",
    "denoising",
    "fit_scaling_law",
    "forced_balance",
    "load_stats",
    "override",
    "place",
    "replay",
    "share_experts",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"equipoise.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'equipoise' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
