"""A replay as one self-contained HTML file, and as a table."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from equipoise.report.document import document
from equipoise.serving.replay import WINDOWS, Results


@dataclass(frozen=True)
class Column:
    """One column: the key of a policy's value, its heading, its format and its meaning."""

    key: str
    title: str
    form: str
    meaning: str

    def cell(self, policy: Results) -> str:
        """The value as text."""
        return format(policy[self.key], self.form)


COLUMNS = (
    Column("capacity", "capacity", ".1%", "Effective capacity: requests whose first token came within the SLO."),
    Column("goodput", "goodput", ".2f", "Requests per second whose first token came within the SLO."),
    Column("ttft_p50", "P50, s", ".2f", "Time to first token: half of the requests waited at most so long."),
    Column("ttft_p90", "P90, s", ".2f", "The same for 90 % of the requests."),
    Column("ttft_p99", "P99, s", ".2f", "The same for 99 % of the requests."),
    Column("hit_rate", "hits", ".1%", "Share of the prompt tokens that the replica found in its cache."),
    Column("load_cv", "CV", ".2f", "Standard deviation of the replicas' waiting prompt tokens over their mean."),
    Column("router_ms", "router", ".3f", "Processor time in the router per request, ms."),
)


def table(results: Results) -> Table:
    """The replay as a rich table."""
    bound = next(iter(results["policies"].values()))["hit_rate_bound"]
    shown = Table("policy", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), caption=_bound_words(bound))
    for column in COLUMNS:
        shown.add_column(column.title, justify="right")
    for name, policy in results["policies"].items():
        shown.add_row(name, *(column.cell(policy) for column in COLUMNS))
    return shown


def _bound_words(bound: float) -> str:
    return f"One endless cache for all replicas would find {bound:.1%} of the prompt tokens. Router: ms per request."


def headline(results: Results) -> str:
    """Which policy serves the most requests within the SLO, and which follows."""
    settings = results["settings"]
    ranked = sorted(results["policies"].items(), key=lambda item: (-item[1]["capacity"], item[1]["ttft_p90"]))
    (best, first), rest = ranked[0], ranked[1:]
    sentence = f"{best} gives {first['capacity']:.1%} of the requests their first token within {settings['slo']:g} s"
    return f"{sentence}; {rest[0][0]} follows with {rest[0][1]['capacity']:.1%}." if rest else f"{sentence}."


def write_page(results: Results, path: str | Path) -> None:
    """Write the replay as one HTML file that needs no network. Fails: UserError without plotly."""
    Path(path).write_text(_page(results), encoding="utf-8")


def _page(results: Results) -> str:
    body = "".join(part(results) for part in (_header, _table_section, _pictures, _settings_section))
    pictures = {"looks": _looks(results), "plots": _plots(results)}
    return document("Equipoise: replay of requests", body, pictures)


def _header(results: Results) -> str:
    settings = results["settings"]
    speed = f"{settings['requests_per_second']:.3g} per second" if settings["requests_per_second"] else "all at once"
    facts = {
        "Requests": f"{settings['requests']:,}, {speed}",
        "Replicas": f"{settings['replicas']}, simulated",
        "SLO": f"{settings['slo']:g} s to the first token",
        "Warm-up": f"{settings['warmup']} requests",
    }
    listed = "".join(f"<div><dt>{term}</dt><dd>{value}</dd></div>" for term, value in facts.items())
    return (
        '<header><p class="kicker">Equipoise replay of requests</p><h1>Which replica gets a request</h1>'
        f'<p class="lead">{html.escape(headline(results))}</p><dl class="facts">{listed}</dl></header>'
    )


def _table_section(results: Results) -> str:
    looks = _looks(results)
    head = "".join(f'<th scope="col">{html.escape(column.title)}</th>' for column in COLUMNS)
    rows = "".join(
        f'<tr><th scope="row"><i style="background: var({looks[name]["colour"]})"></i>{html.escape(name)}</th>'
        + "".join(f"<td>{column.cell(policy)}</td>" for column in COLUMNS)
        + "</tr>"
        for name, policy in results["policies"].items()
    )
    meanings = "".join(f"<dt>{html.escape(column.title)}</dt><dd>{column.meaning}</dd>" for column in COLUMNS)
    bound = _bound_words(next(iter(results["policies"].values()))["hit_rate_bound"])
    return (
        '<section id="results"><h2>Results</h2><div class="scroll" tabindex="0" role="region" aria-label="Results">'
        f'<table><thead><tr><th scope="col">Policy</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<div class="notes"><p>{bound}</p></div>'
        f'<details><summary>What the columns mean</summary><dl class="meanings">{meanings}</dl></details></section>'
    )


def _settings_section(results: Results) -> str:
    listed = "".join(
        f"<dt>{html.escape(term)}</dt><dd>{html.escape(json.dumps(value))}</dd>"
        for term, value in results["settings"].items()
    )
    return (
        "<section><h2>Settings</h2><p>All figures are simulated: replicas are a model with these constants, no server "
        f'ran.</p><details><summary>Every setting</summary><dl class="meanings">{listed}</dl></details></section>'
    )


def _legend(results: Results) -> str:
    """One button per policy; it hides the policy in all pictures."""
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-method="{html.escape(name)}"><svg width="22" height="8" '
        f'aria-hidden="true"><path d="M0 4h22" stroke="var({look["colour"]})"/></svg>{html.escape(name)}</button>'
        for name, look in _looks(results).items()
    )
    return f'<div class="legend" role="group" aria-label="Policies shown">{buttons}</div>'


def _pictures(results: Results) -> str:
    legend = _legend(results)
    words = "The share of requests whose first token came within the time below. The dotted line is the SLO."
    over_time = (
        "The share of the requests of each fortieth of the replay that got their first token within the SLO; faults "
        "show as dips."
    )
    return _picture("Time to first token", words, "ttft", legend) + _picture(
        "Within the SLO over time", over_time, "time", legend
    )


def _picture(title: str, words: str, name: str, legend: str) -> str:
    return (
        f'<section><h2>{title}</h2><p>{words}</p><figure><div class="controls">{legend}</div>'
        f'<div class="plot" id="{name}" role="img" aria-label="{title}, per policy"></div></figure></section>'
    )


def _looks(results: Results) -> dict[str, dict[str, str]]:
    """Policy to the colour of its line: page.js and theme.css know six."""
    return {
        name: {"label": name, "colour": f"--method-{place % 6 + 1}", "dash": "solid" if place < 6 else "dash"}
        for place, name in enumerate(results["policies"])
    }


def _plots(results: Results) -> dict[str, Any]:
    slo = results["settings"]["slo"]
    shares = [percent / 100 for percent in range(101)]
    times = [(window + 0.5) / WINDOWS for window in range(WINDOWS)]
    policies = results["policies"]
    return {
        "ttft": {
            "trace": _trace("%{x:.2f} s: %{y:.0%}"),
            "layout": {
                "xaxis": {"title": {"text": "Time to first token, s"}, "type": "log", "dtick": 1},
                "yaxis": {"title": {"text": "Share of requests"}, "tickformat": ".0%", "range": [0, 1.02]},
                "hovermode": "closest",
                "shapes": [
                    {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": slo, "x1": slo}
                    | {"line": {"dash": "dot"}}
                ],
            },
            "views": {
                "": {"traces": [_line(name, policy["ttft_percentiles"], shares) for name, policy in policies.items()]}
            },
        },
        "time": {
            "trace": _trace("%{x:.0%} of the replay: %{y:.0%}"),
            "layout": {
                "xaxis": {"title": {"text": "Share of the arrival times"}, "tickformat": ".0%"},
                "yaxis": {"title": {"text": "Within the SLO"}, "tickformat": ".0%", "range": [0, 1.02]},
                "hovermode": "closest",
            },
            "views": {
                "": {"traces": [_line(name, times, policy["capacity_over_time"]) for name, policy in policies.items()]}
            },
        },
    }


def _trace(words: str) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines", "hovertemplate": f"%{{meta.method}}<br>{words}<extra></extra>"}


def _line(name: str, x: list[float], y: Sequence[float | None]) -> dict[str, Any]:
    return {"meta": {"method": name, "band": False}, "x": x, "y": y}
