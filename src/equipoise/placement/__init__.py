"""Which devices hold which experts: planned from a trace, checked, exported to serving engines. No torch is needed."""

from equipoise.placement.export import FORMATS, read_placement, write_placement
from equipoise.placement.placement import Placement, contiguous
from equipoise.placement.settings import Settings
from equipoise.placement.solve import place
from equipoise.placement.validate import complaints

__all__ = [
    "FORMATS",
    "Placement",
    "Settings",
    "complaints",
    "contiguous",
    "place",
    "read_placement",
    "write_placement",
]
