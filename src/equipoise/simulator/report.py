"""A simulation as one self-contained HTML page."""

from __future__ import annotations

import html
import json
from pathlib import Path

from equipoise.report.document import document
from equipoise.simulator.pictures import PHASE_COLOURS, looks, plots, policy_colour
from equipoise.simulator.results import COLUMNS, Facts, headline

LABEL = "Every figure on this page is simulated: real planners, a modelled machine."


def write_page(found: Facts, path: str | Path) -> None:
    """Write the page, which needs no network. Fails: UserError without plotly."""
    Path(path).write_text(page(found), encoding="utf-8")


def page(found: Facts) -> str:
    """The page: the table, where the time goes, one layer rank by rank, who waits for whom, memory, all settings."""
    body = "".join([_header(found), _results(found), *_pictures(found), _calibration(found), _settings(found)])
    return document("Equipoise: simulated policies", body, {"looks": looks(found), "plots": plots(found)})


def _pictures(found: Facts) -> list[str]:
    phases = {phase: PHASE_COLOURS[phase] for phase in found["phases"]}
    policies = {name: policy_colour(place) for place, name in enumerate(found["policies"])}
    told = {
        "phases": (
            "Where the time goes",
            "A step's time by phase, each until its slowest rank is done.",
            _legend(phases),
        ),
        "timeline": (
            "One layer, rank by rank",
            "The layer whose time is the median one. Grey is waiting for the phase's slowest rank.",
            _legend(PHASE_COLOURS) + _choice(found),
        ),
        "waits": (
            "Who waits for whom",
            "How long the rank on the left waited for the rank below, over all layers of a step: a strong column is a "
            "rank for which all wait.",
            _choice(found),
        ),
        "memory": (
            "Memory",
            "Experts and their rows on the fullest rank, without attention; the line is what a rank has.",
            _legend(policies),
        ),
    }
    return [_picture(title, words, name, controls) for name, (title, words, controls) in told.items()]


def _header(found: Facts) -> str:
    settings, cluster = found["settings"], found["cluster"]
    groups = f"{settings['replicas']} groups of {settings['ep']}" if settings["replicas"] > 1 else "one group"
    terms = {
        "Cluster": f"{cluster['name']}, {cluster['num_ranks']:,} ranks, {groups}",
        "Model": f"{settings['shape']['name']}, {settings['shape']['num_layers']} expert layers",
        "Workload": found["source"],
        "Tokens": f"{settings['tokens']:,} per rank, {'training' if settings['training'] else 'forward only'}",
    }
    listed = "".join(f"<div><dt>{term}</dt><dd>{html.escape(words)}</dd></div>" for term, words in terms.items())
    return (
        '<header><p class="kicker">Equipoise simulation</p><h1>What each policy would cost</h1>'
        f'<p class="lead">{html.escape(headline(found))}</p><dl class="facts">{listed}</dl></header>'
    )


def _results(found: Facts) -> str:
    head = "".join(f'<th scope="col">{column.title}</th>' for column in COLUMNS)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td>{column.cell(policy)}</td>" for column in COLUMNS)
        + "</tr>"
        for name, policy in found["policies"].items()
    )
    meanings = "".join(f"<dt>{column.title}</dt><dd>{column.meaning}</dd>" for column in COLUMNS)
    return (
        f'<section id="results"><h2>Results</h2><p>{LABEL}</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Results">'
        f'<table><thead><tr><th scope="col">Policy</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f"{_notes(found)}"
        f'<details><summary>What the columns mean</summary><dl class="meanings">{meanings}</dl></details></section>'
    )


def _notes(found: Facts) -> str:
    memory = found["cluster"]["memory"] / 1e9
    said = [
        f"{name}: {words}"
        for name, policy in found["policies"].items()
        for words, holds in (
            (f"{policy['peak_gb']:.0f} GB do not fit into a rank's {memory:.0f} GB.", not policy["fits"]),
            ("it saw the very loads that it was measured on, for the source has one window.", policy["foresight"]),
            (f"{policy['dropped_rows']:,.0f} rows of a step were dropped.", policy["dropped_rows"] > 0),
        )
        if holds
    ]
    return f'<div class="notes">{"".join(f"<p>{html.escape(words)}</p>" for words in said)}</div>' if said else ""


def _picture(title: str, words: str, name: str, controls: str) -> str:
    return (
        f'<section><h2>{title}</h2><p>{words}</p><figure><div class="controls">{controls}</div>'
        f'<div class="plot" id="{name}" role="img" aria-label="{title}"></div></figure></section>'
    )


def _choice(found: Facts) -> str:
    options = "".join(
        f'<option value="{place}">{html.escape(name)}</option>' for place, name in enumerate(found["policies"])
    )
    return f'<div class="choices"><label>Policy <select>{options}</select></label></div>'


def _legend(colours: dict[str, str]) -> str:
    """One button per phase or policy; it hides that in all pictures."""
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-method="{html.escape(name)}"><svg width="22" height="8" '
        f'aria-hidden="true"><path d="M0 4h22" stroke="var({colour})"/></svg>{html.escape(name)}</button>'
        for name, colour in colours.items()
    )
    return f'<div class="legend" role="group" aria-label="Shown">{buttons}</div>'


def _calibration(found: Facts) -> str:
    if "calibration" not in found:
        return ""
    fitted = ", ".join(f"{name} {value:.3g}" for name, value in found["calibration"]["constants"].items())
    rows = "".join(
        f'<tr><th scope="row">{html.escape(point["name"])}</th><td>{point["measured"]:.4g}</td>'
        f"<td>{point['measured'] * (1 + point['error']):.4g}</td><td>{point['error']:+.1%}</td></tr>"
        for point in found["calibration"]["points"]
    )
    return (
        f'<section id="calibration"><h2>Calibration</h2><p>Fitted: {html.escape(fitted)}.</p><div class="scroll">'
        '<table><thead><tr><th scope="col">Point</th><th scope="col">Measured</th><th scope="col">Simulated</th>'
        f'<th scope="col">Error</th></tr></thead><tbody>{rows}</tbody></table></div></section>'
    )


def _settings(found: Facts) -> str:
    cluster = found["cluster"]
    sources = cluster["sources"]
    figures = {name: f"{cluster[name]:.4g}" for name in ("flops", "memory", "memory_bandwidth")}
    figures |= {f"{link['name']} bandwidth": f"{link['bandwidth']:.4g} bytes/s" for link in cluster["links"]}
    listed = {name: f"{value}; {sources.get(name, 'no source given')}" for name, value in figures.items()}
    listed |= {name: f"{value:.4g}" for name, value in cluster["software"].items()}
    listed |= {name: json.dumps(value) for name, value in found["settings"].items()}
    items = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(words)}</dd>" for term, words in listed.items())
    return (
        f"<section><h2>Settings</h2><p>{LABEL} Each figure of the machine, with its source.</p>"
        f'<details><summary>Every setting</summary><dl class="meanings">{items}</dl></details></section>'
    )
