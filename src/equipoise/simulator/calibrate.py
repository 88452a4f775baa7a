"""Fit how much of a cluster's hardware is reached to measured times or ratios."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from equipoise.errors import UserError, require
from equipoise.nearest import nearest
from equipoise.simulator.cluster import Cluster
from equipoise.simulator.shape import Shape, find_shape
from equipoise.simulator.simulation import Settings, simulate

# Between which values each constant of ``Software`` is sought.
BOUNDS = {
    "efficiency": (0.05, 1.0),
    "half_rows": (1.0, 4096.0),
    "launch_seconds": (1e-7, 1e-3),
    "row_passes": (0.1, 100.0),
    "link_efficiency": (0.02, 1.0),
    "weight_efficiency": (0.02, 1.0),
    "hop_seconds": (1e-8, 1e-3),
    "message_seconds": (1e-8, 1e-3),
    "plan_seconds": (1e-7, 0.1),
}
USUAL = ("efficiency", "half_rows", "row_passes", "link_efficiency", "weight_efficiency")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measured point: either the seconds of a policy's step, or its speed-up over native.

    Attributes:
        shape: sizes; one layer of a known model's experts where a file gives its name.
        workload: as for ``simulate``.
        ranks: of the expert-parallel group that was measured.
        tokens: of a rank.
        policy: a policy's name.
        training: with the backward pass.
        seconds: measured time of a step.
        speedup: measured time of native over that of the policy.
    """

    shape: Shape
    workload: str
    ranks: int
    tokens: int
    policy: str
    training: bool = False
    seconds: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        """Fails: UserError unless just one figure was measured, and is above 0."""
        figures = [value for value in (self.seconds, self.speedup) if value is not None]
        require(len(figures) == 1, "A measured point needs either seconds or speedup.")
        require(0 < figures[0] < math.inf, f"A measured figure must be above 0, not {figures[0]}.")

    @property
    def measured(self) -> float:
        """The figure."""
        return self.seconds if self.seconds is not None else float(self.speedup or 0)

    def simulated(self, cluster: Cluster) -> float:
        """What the model says of it."""
        settings = Settings(shape=self.shape, ep=self.ranks, tokens=self.tokens, training=self.training, windows=1)
        part = cluster.part(self.ranks)
        if self.seconds is not None:
            return simulate(self.workload, part, [self.policy], settings).outcomes[self.policy].seconds
        if self.policy == "native":
            return 1.0
        return simulate(self.workload, part, ["native", self.policy], settings).speedup(self.policy)

    def error(self, cluster: Cluster) -> float:
        """Simulated over measured, minus one."""
        return self.simulated(cluster) / self.measured - 1


@dataclass(frozen=True)
class Fitted:
    """A calibrated cluster.

    Attributes:
        cluster: with the constants that fit best.
        constants: what was fitted, by name.
        errors: of every point, simulated over measured minus one.
    """

    cluster: Cluster
    constants: dict[str, float]
    errors: list[float]


def calibrate(cluster: Cluster, points: Sequence[Measurement], names: Sequence[str] = USUAL) -> Fitted:
    """Fit constants of ``cluster.software`` by least squares of the ratios' logarithms.

    Fails: UserError for an unknown constant, and for more constants than points.
    """
    known = [item.name for item in fields(cluster.software)]
    for name in names:
        require(name in known, f"Unknown constant {name!r}{nearest(name, known)}; there are {', '.join(known)}.")
    require(len(points) >= len(names) > 0, f"{len(points)} measured points cannot fit {len(names)} constants.")
    low, high = np.log([BOUNDS[name] for name in names]).T

    def fitting(logs: Float[np.ndarray, " constants"]) -> Cluster:
        values = {name: float(value) for name, value in zip(names, np.exp(np.clip(logs, low, high)))}
        return replace(cluster, software=replace(cluster.software, **values))

    def residuals(logs: Float[np.ndarray, " constants"]) -> Float[np.ndarray, " points"]:
        tried = fitting(logs)
        return np.log([point.simulated(tried) / point.measured for point in points])

    start = np.log([getattr(cluster.software, name) for name in names])
    inside = np.clip(start, low + 0.05 * (high - low), high - 0.05 * (high - low))
    best = fitting(least_squares(residuals, inside, bounds=(low, high), diff_step=1e-3, x_scale=high - low).x)
    constants = {name: getattr(best.software, name) for name in names}
    return Fitted(best, constants, [point.error(best) for point in points])


def read_measurements(path: str | Path) -> tuple[list[Measurement], tuple[str, ...]]:
    """Measured points, and the constants to fit, from JSON: ``{"points": [{...}], "fit": ["row_passes"]}``.

    A point has the fields of ``Measurement``; its shape is a known model's name, which means one layer of experts, or
    the fields of ``Shape``.

    Fails: UserError for a file that cannot be read, unknown keys, with the nearest, and values of the wrong type.
    """
    try:
        written = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read the measurements {path} ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}).") from error
    holds = isinstance(written, dict) and isinstance(written.get("points"), list)
    require(holds, f'{path} must hold {{"points": [...]}}.')
    _refuse_unknown(written, ["points", "fit"], str(path))
    names = written.get("fit", list(USUAL))
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    require(listed, f"{path}: fit must be a list of names.")
    return [_measurement(point, f"{path}, point {place}") for place, point in enumerate(written["points"], 1)], tuple(
        names
    )


def one_layer(shape: Shape) -> Shape:
    """One layer's experts by themselves, as benchmarks of a layer time them."""
    return replace(shape, num_layers=1, other_params=0.0)


def _measurement(entries: Any, where: str) -> Measurement:
    require(isinstance(entries, dict), f"{where} must be an object.")
    values = _typed(entries, {item.name: str(item.type) for item in fields(Measurement)}, where)
    missing = [name for name in ("shape", "workload", "ranks", "tokens", "policy") if name not in values]
    require(not missing, f"{where}: {', '.join(missing)} must be given.")
    require(min(values["ranks"], values["tokens"]) >= 1, f"{where}: ranks and tokens must be at least 1.")
    values["shape"] = _shape(values["shape"], f"{where}, shape")
    return Measurement(**values)


def _shape(entry: Any, where: str) -> Shape:
    if isinstance(entry, str):
        return one_layer(find_shape(entry))
    require(isinstance(entry, dict), f"{where} must be the name of a model, or sizes.")
    sizes = _typed(entry, {item.name: str(item.type) for item in fields(Shape)}, where)
    missing = [name for name in ("dim", "hidden_dim", "num_experts", "top_k") if name not in sizes]
    require(not missing, f"{where}: {', '.join(missing)} must be given.")
    return Shape(**sizes)


def _typed(entries: dict[str, Any], kinds: dict[str, str], where: str) -> dict[str, Any]:
    """Values of the fields' types; a float may be written as a whole number."""
    _refuse_unknown(entries, list(kinds), where)
    checks: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}
    found: dict[str, Any] = {}
    for name, value in entries.items():
        kind = kinds[name].removesuffix(" | None")
        flag = isinstance(value, bool) and kind != "bool"  # to Python, True is a number
        fits = isinstance(value, checks.get(kind, (object,))) and not flag
        require(fits, f"{where}: {name} must be of type {kind}, not {value!r}.")
        found[name] = float(value) if kind == "float" else value
    return found


def _refuse_unknown(entries: dict[str, Any], known: list[str], where: str) -> None:
    for key in entries:
        require(key in known, f"{where}: unknown key {key!r}{nearest(key, known)}.")
