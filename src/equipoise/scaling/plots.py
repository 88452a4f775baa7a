"""The report's pictures, as plotly's JSON without colours: the page's script adds those of the light or the dark theme.

The form is that of ``report/figures.py``: a plot has views, the page's controls choose one by its key, and a trace's
``meta`` names whose look it takes.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from equipoise.report.looks import COLOURS, DASHES
from equipoise.scaling.form import CHINCHILLA
from equipoise.scaling.identify import budgets_of
from equipoise.scaling.law import ScalingLaw

Plot = dict[str, Any]
Laws = Mapping[str, ScalingLaw]

FEWEST_OF_A_BUDGET = 3
LONGEST_LEGEND = 12
CURVE_POINTS = 60
QUANTITIES = {"params": "Parameters", "tokens": "Tokens", "loss": "Loss, nats per token"}


def label_of(method: str) -> str:
    """What the page calls a method."""
    return method or "law"


def budget_label(budget: float) -> str:
    """What the page calls a budget."""
    return f"{budget:.1e} FLOPs".replace("e+", "e")


def looks(laws: Laws) -> dict[str, dict[str, str]]:
    """Methods and budgets to their label, the CSS variable of their colour and their dash."""
    names = [[label_of(method) for method in laws], [budget_label(budget) for budget in all_budgets(laws)]]
    found = {"best": {"label": "best size", "colour": "--baseline", "dash": "dash"}}
    for group in names:
        for place, name in enumerate(group):
            turn, colour = divmod(place, COLOURS)
            dash = DASHES[turn % len(DASHES)]
            found[name] = {"label": html.escape(name), "colour": f"--method-{colour + 1}", "dash": dash}
    return found


def all_budgets(laws: Laws) -> list[float]:
    """Budgets with several sizes, over all laws without extra terms; none where there are too many to tell apart."""
    found = {
        float(f"{budget:.1e}")
        for law in laws.values()
        if law.form == CHINCHILLA
        for budget, members in budgets_of(law.runs.flops).items()
        if len(members) >= FEWEST_OF_A_BUDGET
    }
    return sorted(found) if len(found) <= LONGEST_LEGEND else []


def isoflop_plot(laws: Laws) -> Plot:
    """Loss over model size, a curve per budget; the views are methods, by position."""
    views = {}
    for place, law in enumerate(laws.values()):
        if law.form == CHINCHILLA:
            views[str(place)] = {"traces": _isoflop_traces(law)}
    return {
        "trace": {
            "type": "scatter",
            "hovertemplate": "%{meta.method}<br>%{x:.3s} parameters<br>loss %{y:.4f}<extra></extra>",
        },
        "layout": {
            "xaxis": {"title": {"text": "Parameters"}, "type": "log", "exponentformat": "power", "dtick": 1},
            "yaxis": {"title": {"text": "Loss, nats per token"}},
            "hovermode": "closest",
        },
        "views": views,
    }


def _isoflop_traces(law: ScalingLaw) -> list[Plot]:
    traces: list[Plot] = []
    path = []
    for budget, members in budgets_of(law.runs.flops).items():
        if len(members) < FEWEST_OF_A_BUDGET:
            continue
        params = law.runs.params[members]
        best = law.optimum(budget)
        path.append((best.params, best.loss))
        sizes = np.geomspace(params.min() / 1.3, params.max() * 1.3, CURVE_POINTS)
        tokens = budget / (law.runs.flops_per_product * sizes)
        meta = {"method": budget_label(float(f"{budget:.1e}")), "band": False}
        curve = law.surface.loss(sizes, tokens)
        traces.append({"x": _short(sizes), "y": _short(curve), "mode": "lines", "meta": meta, "hoverinfo": "skip"})
        traces.append({"x": _short(params), "y": _short(law.runs.loss[members]), "mode": "markers", "meta": meta})
    x, y = np.array(path).T
    best_trace = {"x": _short(x), "y": _short(y), "mode": "lines+markers", "meta": {"method": "best", "band": False}}
    return [*traces, best_trace]


def frontier_plot(laws: Laws, high: float) -> Plot:
    """The best size, tokens and loss over compute, with bands; the views are these three."""
    views = {}
    for name, title in QUANTITIES.items():
        traces = [trace for method, law in laws.items() for trace in _frontier(label_of(method), law, name, high)]
        axis: Plot = {"title": {"text": title}}
        if name != "loss":
            axis |= {"type": "log", "exponentformat": "power", "dtick": 1}
        views[name] = {"traces": traces, "layout": {"yaxis": axis}}
    return {
        "trace": {
            "type": "scatter",
            "hovertemplate": "%{meta.method}<br>%{x:.3s} FLOPs<br>%{y:.4s}<extra></extra>",
        },
        "layout": {
            "xaxis": {"title": {"text": "FLOPs of training"}, "type": "log", "exponentformat": "power", "dtick": 1},
            "hovermode": "closest",
        },
        "views": views,
    }


def _frontier(name: str, law: ScalingLaw, quantity: str, high: float) -> list[Plot]:
    if law.form != CHINCHILLA:
        return []
    flops = np.geomspace(law.runs.flops.min(), max(high, law.runs.flops.max()), CURVE_POINTS)
    optima = [law.optimum(float(budget)) for budget in flops]
    line = np.array([getattr(optimum, quantity) for optimum in optima])
    traces: list[Plot] = []
    if len(law.draws):
        edges = np.array([optimum.intervals[quantity] for optimum in optima]).T
        there = np.isfinite(edges).all(0) & (edges > 0).all(0)
        band = {"x": _short(np.r_[flops[there], flops[there][::-1]]), "meta": {"method": name, "band": True}}
        ends = np.r_[edges[1][there], edges[0][there][::-1]]
        traces.append(band | {"y": _short(ends), "mode": "lines", "fill": "toself", "hoverinfo": "skip"})
    traces.append({"x": _short(flops), "y": _short(line), "mode": "lines", "meta": {"method": name, "band": False}})
    if quantity == "loss":
        runs = {"x": _short(law.runs.flops), "y": _short(law.runs.loss)}
        traces.append(runs | {"mode": "markers", "meta": {"method": name, "band": False}})
    return traces


def residual_plot(laws: Laws) -> Plot:
    """Measured minus fitted loss; the views are what it is drawn over."""
    axes = {"flops": "FLOPs of training", "params": "Parameters", "ratio": "Tokens per parameter"}
    views = {}
    for key, title in axes.items():
        traces = []
        for method, law in laws.items():
            over = law.runs.tokens / law.runs.params if key == "ratio" else getattr(law.runs, key)
            residuals = law.runs.loss - law.predict(law.runs.features())
            meta = {"method": label_of(method), "band": False}
            traces.append({"x": _short(over), "y": _short(residuals), "mode": "markers", "meta": meta})
        axis = {"title": {"text": title}, "type": "log", "exponentformat": "power"}
        views[key] = {"traces": traces, "layout": {"xaxis": axis}}
    return {
        "trace": {"type": "scatter", "hovertemplate": "%{meta.method}<br>%{x:.3s}<br>%{y:+.4f} nats<extra></extra>"},
        "layout": {"yaxis": {"title": {"text": "Measured minus fitted, nats"}}, "hovermode": "closest"},
        "views": views,
    }


def _short(values: Float[np.ndarray, " N"] | Any) -> list[float]:
    """Six digits are more than a screen shows."""
    return [float(f"{value:.6g}") for value in np.asarray(values)]
