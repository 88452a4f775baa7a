"""The pictures, as plotly's JSON without colours: the page's script adds those of the light or the dark theme.

A plot is ``{"trace": what all its traces share, "layout": ..., "views": {key: {"traces": [...], "layout": ...}}}``. The
page's controls choose the view by its key. A trace's ``meta`` names its method, or the rows of a heat map.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from equipoise.report.curves import Curve, Point, at_least, lines, over_seeds, rounded, scaled, windows
from equipoise.report.results import Results, runs_by_method

Plot = dict[str, Any]

CELLS = 120_000  # of all views of the domain picture together: the page stays under its 6 MB
LEAST_MAX_VIO = 0.01  # the lower end of a logarithmic axis, which has no place for 0
MAX_VIO_TICKS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]
STEEP = 0.2  # share of the budget in which the loss falls too fast to be shown beside the rest; the page says a fifth


def loss_plot(results: Results) -> Plot:
    """Loss over FLOPs: the views are ``validation``, ``difference`` (to the baseline) and ``training``."""
    most = max(run["flops"] for run in results["runs"])
    exponent = math.floor(math.log10(most))
    unit = 10.0**exponent
    curves = {
        "validation": _curves(results, "validation", "flops", "loss"),
        "difference": _differences(results),
        "training": _curves(results, "curve", "flops", "loss"),
    }
    titles = {"difference": f"Loss minus that of {html.escape(results['baseline'])}"}
    return {
        "trace": {
            "type": "scatter",
            "hovertemplate": f"%{{meta.label}}<br>%{{x:.3f}} &times; 10<sup>{exponent}</sup> FLOPs<br>loss %{{y:.4f}}"
            "<extra></extra>",
        },
        "layout": {
            "xaxis": {
                "title": {"text": f"Compute, 10<sup>{exponent}</sup> FLOPs"},
                "range": rounded([0.98 * STEEP * most / unit, 1.01 * most / unit]),
            },
            "hovermode": "closest",
        },
        "views": {
            view: {
                "traces": lines(results, scaled(of_method, unit)),
                "layout": {
                    "yaxis": {
                        "title": {"text": titles.get(view, "Loss, nats per token")},
                        **_range_from(of_method, STEEP * most),
                    }
                },
            }
            for view, of_method in curves.items()
            if of_method
        },
    }


def max_vio_plot(results: Results) -> Plot:
    """MaxVio of a training batch over steps, on a logarithmic axis, with the floor that chance sets."""
    curves = _curves(results, "curve", "step", "max_vio")
    return {
        "trace": {
            "type": "scatter",
            "hovertemplate": "%{meta.label}<br>step %{x}<br>MaxVio %{y:.3g}<extra></extra>",
        },
        "layout": {
            "xaxis": {"title": {"text": "Step"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "MaxVio of a batch"}, "type": "log", "tickvals": MAX_VIO_TICKS},
            "hovermode": "closest",
            **_floor_line(results),
        },
        "views": {"": {"traces": lines(results, at_least(curves, LEAST_MAX_VIO))}},
    }


def load_plots(results: Results) -> dict[str, Plot]:
    """Method to its heat map of load / mean load, experts by layers, of the method's first run."""
    plots = {}
    for method, runs in runs_by_method(results).items():
        layers = runs[0]["per_layer"]
        cells = [_over_mean(layer["load"]) for layer in layers]
        names = [layer["name"] for layer in layers]
        trace = {"z": cells, **_rows(names), "zmin": 0, "zmax": 2}
        plots[method] = {
            "trace": _heat_map("%{text}<br>expert %{x}<br>%{z:.2f} times the mean load"),
            "layout": _heat_layout(names, "Layer", _short(names)),
            "views": {"": {"traces": [trace]}},
        }
    return plots


def domain_plot(results: Results) -> Plot:
    """Heat map of a domain's share per expert over an equal share; the views are ``method/layer``, by position.

    Layers are thinned out where the page would grow too large: see `domain_layers`.
    """
    domains = list(results["data"]["domains"])
    views = {}
    for position, runs in enumerate(runs_by_method(results).values()):
        for place in domain_layers(results):
            load = runs[0]["per_layer"][place]["domain_load"]
            views[f"{position}/{place}"] = {"traces": [{"z": [_over_mean(load[domain]) for domain in domains]}]}
    return {
        "trace": {
            **_heat_map("%{text}<br>expert %{x}<br>%{z:.2f} times an equal share"),
            **_rows(domains),
            "zmin": 0,
            "zmax": 4,
        },
        "layout": _heat_layout(domains, "", [_cut(domain) for domain in domains]),
        "views": views,
    }


def domain_layers(results: Results) -> list[int]:
    """Positions of the layers that the domain picture offers: all, or as many as `CELLS` allow."""
    runs = [runs[0] for runs in runs_by_method(results).values()]
    layers = min(len(run["per_layer"]) for run in runs)
    widest = max(len(layer["load"]) for run in runs for layer in run["per_layer"])
    fitting = CELLS // (widest * len(results["data"]["domains"]) * len(runs))
    return sorted({round(place) for place in np.linspace(0, layers - 1, min(layers, max(1, fitting)))})


def noise_floor(results: Results) -> float | None:
    """MaxVio that chance alone leaves in one batch where every expert is equally likely.

    sqrt(2 ln E (1 - K/E) / (T K/E)), T the tokens of a step: what to expect of the largest of E independent, nearly
    normal counts. None where the runs differ in T or in E.
    """
    sizes = {
        (round(run["tokens"] / run["steps"]), len(layer["load"]))
        for run in results["runs"]
        for layer in run["per_layer"]
    }
    if len(sizes) != 1:
        return None
    tokens, experts = sizes.pop()
    share = results["settings"]["model"]["top_k"] / experts
    return math.sqrt(2 * math.log(experts) * (1 - share) / (tokens * share))


def _curves(results: Results, key: str, x: str, y: str) -> dict[str, Curve]:
    return {
        method: over_seeds([windows([(point[x], point[y]) for point in run[key]]) for run in runs])
        for method, runs in runs_by_method(results).items()
    }


def _differences(results: Results) -> dict[str, Curve]:
    """Validation loss minus the baseline's of the same seed, which is interpolated to the same FLOPs."""
    runs = runs_by_method(results)
    baseline = {run["seed"]: run["validation"] for run in runs.get(results["baseline"], [])}
    curves = {}
    for method, several in runs.items():
        paired = [run for run in several if run["seed"] in baseline]
        if paired:
            curves[method] = over_seeds([_minus(run["validation"], baseline[run["seed"]]) for run in paired])
    return curves


def _minus(points: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[Point]:
    flops, loss = [point["flops"] for point in other], [point["loss"] for point in other]
    return [(point["flops"], point["loss"] - float(np.interp(point["flops"], flops, loss))) for point in points]


def _range_from(curves: dict[str, Curve], start: float) -> dict[str, Any]:
    """A vertical range that shows all finite values from `start` on; the default range where there are none."""
    bounds = [
        value for curve in curves.values() for edge in (curve.low, curve.high) for value in edge[curve.x >= start]
    ]
    bounds = [value for value in bounds if math.isfinite(value)]
    if not bounds:
        return {}
    margin = 0.06 * (max(bounds) - min(bounds)) or 0.01  # a single value still needs a height
    return {"range": rounded([min(bounds) - margin, max(bounds) + margin])}


def _floor_line(results: Results) -> dict[str, Any]:
    floor = noise_floor(results)
    if floor is None:
        return {}
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": floor, "y1": floor, "line": {"dash": "dot"}}
    words = {
        "xref": "paper",
        "x": 1,
        "y": math.log10(floor),  # plotly places annotations of a logarithmic axis by the logarithm
        "text": "floor",
        "showarrow": False,
        "xanchor": "left",  # beside the picture, where no line runs
        "xshift": 6,
    }
    return {"shapes": [line], "annotations": [words]}


def _over_mean(load: Sequence[int]) -> list[float | None]:
    """Load over mean load; None, an empty square, where nothing was counted."""
    total = sum(load)
    return [round(rows * len(load) / total, 2) if total else None for rows in load]


def _heat_map(words: str) -> dict[str, Any]:
    return {"type": "heatmap", "showscale": False, "hoverongaps": False, "hovertemplate": f"{words}<extra></extra>"}


def _rows(names: Sequence[str]) -> dict[str, Any]:
    return {"meta": {"rows": [html.escape(name) for name in names]}}


def _heat_layout(names: Sequence[str], title: str, shown: Sequence[str]) -> dict[str, Any]:
    ticks = {
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "ticktext": [html.escape(name) for name in shown],
    }
    return {
        "xaxis": {"title": {"text": "Expert"}, "showgrid": False, "zeroline": False},
        "yaxis": {"title": {"text": title}, "autorange": "reversed", "showgrid": False, "zeroline": False, **ticks},
        "hovermode": "closest",
    }


def _short(names: Sequence[str]) -> list[str]:
    """The dot-separated parts in which the names differ: ``layers.3.moe`` among its like is ``3``."""
    parts = [name.split(".") for name in names]
    if len(names) < 2 or len({len(part) for part in parts}) > 1:
        return list(names)
    differing = [place for place, column in enumerate(zip(*parts)) if len(set(column)) > 1]
    return [".".join(part[place] for place in differing) for part in parts]


def _cut(text: str, longest: int = 16) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "\u2026"
