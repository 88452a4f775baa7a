"""The report's pictures, as plotly's JSON without colours: the page's script adds those of the theme."""

from __future__ import annotations

from typing import Any

import numpy as np

from equipoise.simulator.cost import PHASES
from equipoise.simulator.results import Facts

WAITING = "waiting"
PHASE_COLOURS = {name: f"--method-{place + 1}" for place, name in enumerate(PHASES)} | {WAITING: "--baseline"}
MOST = 4  # how dark a picture of waiting gets: times the mean

Plot = dict[str, Any]


def policy_colour(place: int) -> str:
    """The CSS variable of a policy's colour, by its place."""
    return f"--method-{place % 6 + 1}"


def looks(found: Facts) -> dict[str, dict[str, str]]:
    """Phase or policy to its label, colour and dash."""
    colours = PHASE_COLOURS | {name: policy_colour(place) for place, name in enumerate(found["policies"])}
    return {name: {"label": name, "colour": colour, "dash": "solid"} for name, colour in colours.items()}


def plots(found: Facts) -> dict[str, Plot]:
    """All pictures by the id of their place on the page."""
    return {"phases": _phases(found), "timeline": _timeline(found), "waits": _waits(found), "memory": _memory(found)}


def _phases(found: Facts) -> Plot:
    policies = found["policies"]
    traces = [
        {"meta": _meta(phase), "y": list(policies), "x": [_ms(policy["phases"][phase]) for policy in policies.values()]}
        for phase in PHASES
    ]
    return {
        "trace": {"type": "bar", "orientation": "h", "hovertemplate": "%{meta.method}: %{x:.1f} ms<extra>%{y}</extra>"},
        "layout": {
            "barmode": "stack",
            "xaxis": {"title": {"text": "Time of a step, ms (simulated)"}},
            "yaxis": {"autorange": "reversed"},
            "hovermode": "closest",
        },
        "views": {"": {"traces": traces}},
    }


def _timeline(found: Facts) -> Plot:
    views = {str(place): _timeline_view(policy) for place, policy in enumerate(found["policies"].values())}
    return {
        "trace": {
            "type": "bar",
            "orientation": "h",
            "hovertemplate": "rank %{y}<br>%{meta.method}: %{x:.3f} ms<extra></extra>",
        },
        "layout": {
            "barmode": "overlay",
            "bargap": 0,
            "xaxis": {"title": {"text": "Time within the layer, ms (simulated)"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "Rank"}, "type": "category", "autorange": "reversed"},
            "hovermode": "closest",
        },
        "views": views,
    }


def _timeline_view(policy: Facts) -> Plot:
    """Bars that start where the phase before ended for the slowest rank."""
    bars: dict[str, dict[str, list[Any]]] = {name: {"x": [], "y": [], "base": []} for name in PHASE_COLOURS}
    start = 0.0
    for phase in policy["timeline"]:
        until = phase["until"]
        for rank, seconds in zip(policy["ranks"], phase["seconds"]):
            for name, length, base in ((phase["phase"], seconds, start), (WAITING, until - seconds, start + seconds)):
                if length > 0:
                    bars[name]["x"].append(_ms(length))
                    bars[name]["y"].append(rank)
                    bars[name]["base"].append(_ms(base))
        start += until
    return {"traces": [{"meta": _meta(name), **bar} for name, bar in bars.items()]}


def _waits(found: Facts) -> Plot:
    views = {}
    for place, policy in enumerate(found["policies"].values()):
        waits, names = np.array(policy["waits_for"]), policy["ranks"]
        over_mean = waits / waits.mean() if waits.any() else np.zeros_like(waits)
        trace = {"x": names, "y": names, "meta": {"rows": names}, "customdata": np.round(1e3 * waits, 2).tolist()}
        # The page's colours are balanced at 1, which stands for no waiting here: nothing is below.
        shades = {"z": np.round(1 + over_mean, 2).tolist(), "zmin": 0.99, "zmax": 1 + MOST}
        views[str(place)] = {"traces": [trace | shades]}
    return {
        "trace": {
            "type": "heatmap",
            "showscale": False,
            "hovertemplate": "rank %{y} waits for rank %{x}<br>%{customdata} ms<extra></extra>",
        },
        "layout": {
            "xaxis": {"title": {"text": "is waited for"}, "type": "category", "showgrid": False, "zeroline": False},
            "yaxis": {"title": {"text": "waits"}, "type": "category", "autorange": "reversed", "showgrid": False},
            "hovermode": "closest",
        },
        "views": views,
    }


def _memory(found: Facts) -> Plot:
    limit = found["cluster"]["memory"] / 1e9
    policies = found["policies"]
    traces = [
        {"meta": _meta(name), "y": [name], "x": [round(policy["peak_gb"], 2)]} for name, policy in policies.items()
    ]
    return {
        "trace": {"type": "bar", "orientation": "h", "hovertemplate": "%{y}: %{x:.1f} GB<extra></extra>"},
        "layout": {
            "barmode": "stack",
            "xaxis": {"title": {"text": "Memory of the fullest rank, GB (simulated)"}, "rangemode": "tozero"},
            "yaxis": {"autorange": "reversed"},
            "hovermode": "closest",
            "shapes": [
                {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": limit, "x1": limit, "line": {"dash": "dot"}}
            ],
        },
        "views": {"": {"traces": traces}},
    }


def _meta(name: str) -> dict[str, Any]:
    return {"method": name, "band": False}


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 4)
