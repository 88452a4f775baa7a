"""Fitted laws as one self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

from equipoise.report.document import document
from equipoise.scaling.plots import (
    Laws,
    all_budgets,
    budget_label,
    frontier_plot,
    isoflop_plot,
    label_of,
    looks,
    residual_plot,
)
from equipoise.scaling.summary import Summary
from equipoise.scaling.wording import SIZES, UNKNOWN, bounds, count, number, ranged

STROKES = {"solid": "", "dash": "6 4", "dot": "2 3", "dashdot": "6 3 2 3"}


def page(laws: Laws, summary: Summary, source: str, high: float) -> str:
    """The page: what to train, the parameters with intervals, the fit, its residuals.

    Args:
        laws: by method.
        summary: what ``summarise`` says of them.
        source: where the runs come from.
        high: FLOPs up to which the frontier is drawn.

    Fails: UserError without plotly.
    """
    dense = any("comparison" in law for law in summary["laws"].values())
    sections = [
        _header(summary, source),
        _warnings(summary),
        _optima(summary),
        _parameters(summary),
        _comparison(summary) if dense else "",
        _isoflop(laws) if all_budgets(laws) else "",
        _frontier(laws) if dense else "",
        _residuals(laws),
    ]
    plots = {"residuals": residual_plot(laws)}
    plots |= {"isoflop": isoflop_plot(laws)} if all_budgets(laws) else {}
    plots |= {"frontier": frontier_plot(laws, high)} if dense else {}
    return document("Equipoise: scaling law", "".join(sections), {"looks": looks(laws), "plots": plots})


def _header(summary: Summary, source: str) -> str:
    laws = summary["laws"]
    runs = sum(law["runs"] for law in laws.values())
    lead = " ".join(crossing["sentence"] for crossing in summary["crossings"]) or _advice(next(iter(laws.values())))
    facts = {"Runs": f"{runs}", "Laws": f"{len(laws)}", "Source": source}
    terms = "".join(f"<div><dt>{term}</dt><dd>{html.escape(value)}</dd></div>" for term, value in facts.items())
    return (
        '<header><p class="kicker">Equipoise scaling law</p><h1>What to train with more compute</h1>'
        f'<p class="lead">{html.escape(lead)}</p><dl class="facts">{terms}</dl></header>'
    )


def _advice(law: Summary) -> str:
    if not law.get("optima"):
        return "Give the experts to choose among to see what to train."
    best = law["optima"][-1]
    experts = f" with {best['experts']} experts" if "experts" in best else ""
    return (
        f"For {best['flops']:.2g} FLOPs, train {ranged(best['params'], count)} parameters{experts} on "
        f"{ranged(best['tokens'], count)} tokens and expect a loss of {ranged(best['loss'])}."
    )


def _warnings(summary: Summary) -> str:
    said = [
        f"{label_of(method)}: {sentence}" if method else sentence
        for method, law in summary["laws"].items()
        for sentence in law["warnings"]
    ]
    if not said:
        return ""
    items = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in said)
    return f'<section id="warnings"><h2>What the runs cannot tell</h2><div class="notes">{items}</div></section>'


def _optima(summary: Summary) -> str:
    rows = []
    for method, law in summary["laws"].items():
        for best in law.get("optima", []):
            experts = (
                [f"{best['experts']}", f"{best['granularity']:g}", count(best["total"])] if "experts" in best else []
            )
            cells = [f"{best['flops']:.2g}", *(_stacked(best[name], words) for name, words in SIZES.items()), *experts]
            rows.append([label_of(method), *cells])
    if not rows:
        return ""
    head = ["Law", "FLOPs", "Parameters", "Tokens", "Loss", "Experts", "Granularity", "Parameters in all"]
    words = "The size and tokens with the lowest loss for a budget; below each figure, its interval."
    return _table("optima", "What to train", words, head[: len(rows[0])], rows)


def _parameters(summary: Summary) -> str:
    names = list(dict.fromkeys(name for law in summary["laws"].values() for name in law["parameters"]))
    rows = [
        [label_of(method), *(_stacked(law["parameters"][name]) if name in law["parameters"] else "" for name in names)]
        for method, law in summary["laws"].items()
    ]
    words = (
        "Loss = E + A N^-alpha + B D^-beta for N parameters and D tokens; the best size grows as compute^a. Intervals "
        "come from refits to shuffled residuals."
    )
    return _table("parameters", "The law", words, ["Law", *names], rows)


def _comparison(summary: Summary) -> str:
    rows, notes = [], []
    for method, law in summary["laws"].items():
        if "comparison" not in law:
            continue
        known, best = law["comparison"], law["optima"][-1]
        ours = {"a": law["parameters"]["a"]["value"]} | {name: best[name]["value"] for name in ("params", "tokens")}
        for name, values in (("variable projection", ours), ("approach 3", known["approach3"])):
            rows.append([f"{label_of(method)}: {name}", *_sizes(values)])
        if "approach2" in known:
            rows.append([f"{label_of(method)}: approach 2", *_sizes(known["approach2"])])
            bias = known["approach2_bias"]
            rows.append([f"{label_of(method)}: its bias on this grid", *_bias(bias)])
        else:
            notes.append(known["approach2_refused"])
    flops = max(law["comparison"]["flops"] for law in summary["laws"].values() if "comparison" in law)
    words = (
        f"The same runs through the two classic approaches, at {flops:.2g} FLOPs. The bias is what approach 2 would "
        f"get wrong on this grid without any noise. {' '.join(notes)}"
    )
    return _table("comparison", "Beside approaches 2 and 3", words, ["Approach", "a", "Parameters", "Tokens"], rows)


def _sizes(values: Summary) -> list[str]:
    return [number(values["a"]), count(values["params"]), count(values["tokens"])]


def _bias(values: Summary) -> list[str]:
    return [
        f"{values['a']:+.4f}",
        *(UNKNOWN if values[k] is None else f"{values[k]:+.1%}" for k in ("params", "tokens")),
    ]


def _isoflop(laws: Laws) -> str:
    options = "".join(
        f'<option value="{place}">{html.escape(label_of(method))}</option>'
        for place, (method, law) in enumerate(laws.items())
        if law.form.features == ("params", "tokens")
    )
    choice = f'<div class="choices"><label>Law <select>{options}</select></label></div>'
    names = ["best", *map(budget_label, all_budgets(laws))]
    words = "One curve per budget: dots are runs, curves the fit, the dashed line joins the best sizes."
    return _picture("Loss over size, budget by budget", words, _legend(laws, names) + choice, "isoflop")


def _frontier(laws: Laws) -> str:
    words = "The best model for a budget, with the interval of the refits as a band. Dots are the runs."
    tabs = _tabs("frontier", {"params": "Parameters", "tokens": "Tokens", "loss": "Loss"})
    return _picture("The best model over compute", words, _legend(laws, map(label_of, laws)) + tabs, "frontier")


def _residuals(laws: Laws) -> str:
    words = "Noise scatters around 0. A bend or a slope here means that the law's form is wrong, or its range too wide."
    tabs = _tabs("residuals", {"flops": "FLOPs", "params": "Parameters", "ratio": "Tokens per parameter"})
    return _picture("What the law leaves", words, _legend(laws, map(label_of, laws)) + tabs, "residuals")


def _picture(title: str, words: str, controls: str, name: str) -> str:
    plot = f'<div class="plot" id="{name}" role="img" aria-label="{html.escape(title)}"></div>'
    figure = f'<figure><div class="controls">{controls}</div>{plot}</figure>'
    return f"<section><h2>{title}</h2><p>{words}</p>{figure}</section>"


def _tabs(name: str, views: dict[str, str]) -> str:
    first = next(iter(views))
    tabs = "".join(
        f'<label><input type="radio" name="{name}" value="{view}"{" checked" if view == first else ""}>'
        f"<span>{words}</span></label>"
        for view, words in views.items()
    )
    return f'<div class="tabs">{tabs}</div>'


def _legend(laws: Laws, names: Any) -> str:
    known, buttons = looks(laws), []
    for name in names:
        look = known[name]
        stroke = f'stroke="var({look["colour"]})" stroke-dasharray="{STROKES[look["dash"]]}"'
        buttons.append(
            f'<button type="button" aria-pressed="true" data-method="{html.escape(name)}">'
            f'<svg width="22" height="8" aria-hidden="true"><path d="M0 4h22" {stroke}/></svg>{look["label"]}</button>'
        )
    return f'<div class="legend" role="group" aria-label="Shown">{"".join(buttons)}</div>'


def _stacked(values: Summary, words: Callable[[float | None], str] = number) -> str:
    """A value above its interval, as HTML."""
    return f"{words(values['value'])}<br><small>{bounds(values, words)}</small>"


def _table(name: str, title: str, words: str, head: list[str], rows: list[list[str]]) -> str:
    headings = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
    return (
        f'<section id="{name}"><h2>{title}</h2><p>{html.escape(words)}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">'
        f"<table><thead><tr>{headings}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )
