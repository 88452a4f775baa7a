"""A method's curve: the mean over its seeds, and the band from the lowest to the highest of them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.report.looks import looks
from equipoise.report.results import Results

Point = tuple[int | float, int | float]  # x and y

WINDOWS = 100  # as many points tell a curve's course and keep the page small


@dataclass(frozen=True)
class Curve:
    """One method's curve.

    Attributes:
        x: where it was measured, rising.
        mean: over the seeds.
        low: the lowest seed.
        high: the highest seed.
        seeds: how many there are.
    """

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    seeds: int


def over_seeds(points: Sequence[Sequence[Point]]) -> Curve:
    """Join the seeds' (x, y) points at the x of the first; another seed's values are interpolated to it."""
    x = np.array([place for place, _ in points[0]], dtype=np.float64)
    of_seed = np.stack([np.interp(x, *np.array(several, dtype=np.float64).T) for several in points])
    return Curve(x, of_seed.mean(0), of_seed.min(0), of_seed.max(0), len(points))


def scaled(curves: dict[str, Curve], unit: float) -> dict[str, Curve]:
    """The curves with x in the given unit."""
    return {method: replace(curve, x=curve.x / unit) for method, curve in curves.items()}


def at_least(curves: dict[str, Curve], least: float) -> dict[str, Curve]:
    """The curves with smaller values raised to `least`, for an axis that ends there."""
    return {
        method: replace(curve, **{name: np.maximum(getattr(curve, name), least) for name in ("mean", "low", "high")})
        for method, curve in curves.items()
    }


def lines(results: Results, curves: dict[str, Curve]) -> list[dict[str, Any]]:
    """Plotly's traces: per method a band where there are several seeds, and above all bands the line of the mean."""
    bands, means = [], []
    for method, curve in curves.items():
        label = html.escape(looks(results)[method]["label"])
        if curve.seeds > 1:
            label += f", mean of {curve.seeds} seeds"
            bands.append(_band(curve) | {"meta": {"method": method, "band": True}})
        mode = "lines+markers" if len(curve.x) < 30 else "lines"
        line = {"mode": mode, "x": rounded(curve.x), "y": rounded(curve.mean, digits=5)}
        means.append(line | {"meta": {"method": method, "label": label}})
    return bands + means


def windows(points: Sequence[Point]) -> list[Point]:
    """The points, or where there are more than `WINDOWS` the means of as many windows of neighbours."""
    if len(points) <= WINDOWS:
        return list(points)
    parts = np.array_split(np.array(points, dtype=np.float64), WINDOWS)
    return [(float(x), float(y)) for x, y in (part.mean(0) for part in parts)]


def rounded(values: Iterable[float], digits: int = 4) -> list[float | None]:
    """The values with so many significant digits; None, a gap in the line, for one that is not finite."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]


def _band(curve: Curve) -> dict[str, Any]:
    """The area between the lowest and the highest seed, as one closed line."""
    seen = np.isfinite(curve.low) & np.isfinite(curve.high)
    x, low, high = curve.x[seen], curve.low[seen], curve.high[seen]
    return {
        "mode": "lines",
        "x": rounded([*x, *x[::-1]]),
        "y": rounded([*high, *low[::-1]], digits=5),
        "fill": "toself",
        "hoverinfo": "skip",
    }
