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
    from equipoise.methods import METHODS
    from equipoise.moe import MoE
    from equipoise.routing.override import forced_balance, override, replay

__version__ = "0.1.0"
_HOMES = {
    "equipoise.balancing.attach": ("Handle", "attach"),
    "equipoise.balancing.load_stats": ("LoadStats", "load_stats"),
    "equipoise.contracts": ("Call", "NonFiniteError", "Routing", "Scores"),
    "equipoise.building": ("Method",),
    "equipoise.methods": ("METHODS",),
    "equipoise.moe": ("MoE",),
    "equipoise.routing.override": ("forced_balance", "override", "replay"),
}
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
    "UserError",
    "attach",
    "forced_balance",
    "load_stats",
    "override",
    "replay",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'equipoise' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
