"""What a planted fault is, and how a broken layer is made."""

from dataclasses import dataclass, field
from typing import Any

from equipoise import MoE
from equipoise.balancing.window import Window
from laws.cases import Make, build


def breaking(layer: type[MoE] | None = None, window: type[Window] | None = None, **parts: type) -> Make:
    """Builds layers some of whose parts (scorer, selector, router, a balancer) are of these classes instead."""

    def make(method: str, **changes: Any) -> MoE:
        built = build(method, **changes)
        built.__class__ = layer or built.__class__
        built.window.__class__ = window or built.window.__class__
        for name, kind in parts.items():
            part = built.balancers[name] if name in built.balancers else getattr(built, name)
            part.__class__ = kind
        return built

    return make


@dataclass(frozen=True)
class Fault:
    """What is broken, and the law that must reject it.

    Attributes:
        law: ``"test_file.test_name"``.
        make: builds the broken layer; by name where the law builds it in another process.
        arguments: the law's others.
    """

    law: str
    make: Make | str
    arguments: dict[str, Any] = field(default_factory=dict)
