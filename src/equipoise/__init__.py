"""Equipoise keeps the experts of a sparse Mixture-of-Experts evenly used."""

from equipoise.balancing.attach import Handle, attach
from equipoise.balancing.load_stats import LoadStats, load_stats
from equipoise.contracts import Call, NonFiniteError, Routing, Scores, UserError
from equipoise.methods import METHODS, Method
from equipoise.moe import MoE
from equipoise.routing.override import forced_balance, override, replay

__version__ = "0.1.0"
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
