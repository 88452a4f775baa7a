"""The page's parts in HTML. Whatever comes from the results is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable

import tomli_w

from equipoise.report.columns import columns, footnotes, name
from equipoise.report.curves import WINDOWS
from equipoise.report.figures import LEAST_MAX_VIO, domain_layers, noise_floor
from equipoise.report.looks import looks
from equipoise.report.results import Results, headline, runs_by_method, summarise


def header(results: Results) -> str:
    """Title, the result in one sentence, and what was compared."""
    count = len(runs_by_method(results))
    title = "One balancing method" if count == 1 else f"{_count(count)} balancing methods, equal compute"
    facts = "".join(f"<div><dt>{term}</dt><dd>{value}</dd></div>" for term, value in _facts(results))
    return (
        f'<header><p class="kicker">Equipoise comparison</p><h1>{title}</h1>'
        f'<p class="lead">{html.escape(headline(results))}</p><dl class="facts">{facts}</dl></header>'
    )


def results_table(results: Results) -> str:
    """The table of the terminal, with what its columns mean."""
    rows = summarise(results)
    several = columns(results, rows)
    look = looks(results)
    headings = "".join(f'<th scope="col">{html.escape(column.title)}</th>' for column in several)
    lines = []
    for row in rows:
        cells = []
        for column in several:
            spread = f" <small>{html.escape(column.spread(row))}</small>" if column.spread(row) else ""
            kind = ' class="grey"' if column.grey(row) else ""
            cells.append(f"<td{kind}>{_minus(column.cell(row))}{spread}</td>")
        swatch = f'<i style="background: var({look[row.method]["colour"]})"></i>'
        lines.append(f'<tr><th scope="row">{swatch}{html.escape(name(row))}</th>{"".join(cells)}</tr>')
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in footnotes(results, rows))
    meanings = "".join(f"<dt>{html.escape(column.title)}</dt><dd>{_minus(column.meaning)}</dd>" for column in several)
    return (
        '<section id="results"><h2>Results</h2>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="Results"><table><thead><tr>'
        f'<th scope="col">Method</th>{headings}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        f'<div class="notes">{notes}</div>'
        f'<details><summary>What the columns mean</summary><dl class="meanings">{meanings}</dl></details></section>'
    )


def loss_section(results: Results) -> str:
    """Loss over FLOPs, with tabs for its views."""
    views = ["validation", *(["difference"] if results["baseline"] in runs_by_method(results) else []), "training"]
    tabs = "".join(
        f'<label><input type="radio" name="loss" value="{view}"{" checked" if view == "validation" else ""}>'
        f"<span>{view.capitalize()}</span></label>"
        for view in views
    )
    words = (
        "Every run may spend the same number of FLOPs: at an equal distance to the right, the lower line has learnt "
        "more."
    )
    if "difference" in views:
        words += f" Difference is the validation loss minus that of {results['baseline']} with the same seed."
    words += " The steep first fifth of the budget is left out."
    if max(map(len, runs_by_method(results).values())) > 1:
        words += " Lines are means over seeds; bands reach from the lowest seed to the highest."
    words += _window(results, "The training loss is averaged over")
    controls = f'<div class="controls">{_legend(results)}<div class="tabs">{tabs}</div></div>'
    return _picture("Loss over compute", words, controls + _plot("loss", "Loss over compute, per method"))


def max_vio_section(results: Results) -> str:
    """MaxVio over steps."""
    floor = noise_floor(results)
    words = (
        "MaxVio is (largest load - mean load) / mean load within one training batch, averaged over layers: 0 is "
        "balanced; at 1, the busiest expert does twice its share."
    )
    if floor is not None:
        words += (
            f" The dotted floor, {floor:.2f}, is what chance leaves where all experts are equally likely; only a "
            "method that settles each batch by itself gets below it."
        )
    if any(point["max_vio"] < LEAST_MAX_VIO for run in results["runs"] for point in run["curve"]):
        words += f" Values under {LEAST_MAX_VIO} are drawn at {LEAST_MAX_VIO}."
    words += _window(results, "Lines are averaged over")
    return _picture(
        "Balance over training",
        words,
        f'<div class="controls">{_legend(results)}</div>{_plot("max-vio", "MaxVio over steps, per method")}',
    )


def load_section(results: Results) -> str:
    """Small multiples: one heat map of the load per method."""
    maps = []
    for position, (method, runs) in enumerate(runs_by_method(results).items()):
        run = runs[0]
        height = 74 + max(18, min(30, 240 // len(run["per_layer"]))) * len(run["per_layer"])
        dead = f", {run['dead_experts']} dead" if run["dead_experts"] else ""
        maps.append(
            f"<figure><figcaption><b>{html.escape(method)}</b> MaxVio {run['max_vio_global']:.2f}{dead}</figcaption>"
            f"{_plot(f'load-{position}', f'Load of every expert, {method}', height)}</figure>"
        )
    return (
        "<section><h2>Load of every expert</h2><p>A square is one expert of one layer: how many tokens of the "
        "validation text it gets, relative to the mean of its layer. The calmer the map, the better the balance."
        f"{_which_seed(results)}</p>{_scale(['idle', 'balanced', 'twice or more'])}"
        f'<div class="maps">{"".join(maps)}</div></section>'
    )


def domain_section(results: Results) -> str:
    """Heat map of domains by experts, with the choice of method and layer."""
    methods = _options(enumerate(runs_by_method(results)))
    layers = results["runs"][0]["per_layer"]
    places = domain_layers(results)
    names = _options((place, layers[place]["name"]) for place in places)
    fewer = f" {len(places)} of {len(layers)} layers can be chosen here." if len(places) < len(layers) else ""
    height = 84 + 34 * len(results["data"]["domains"])
    return _picture(
        "Who serves which domain",
        "The share of a domain's tokens that goes to an expert, relative to an equal share. Where the rows differ, "
        "experts specialise. The table's specialisation condenses this into one number: the mutual information "
        "between domain and expert over the entropy of the domain."
        f"{fewer}{_which_seed(results)}",
        '<div class="controls"><div class="choices">'
        f"<label>Method <select>{methods}</select></label><label>Layer <select>{names}</select></label></div>"
        f"{_scale(['none', 'equal share', '4 times or more'], quarter=True)}</div>"
        f"{_plot('domain', 'Share of every domain per expert', height)}",
    )


def settings_section(results: Results) -> str:
    """What every run was, and how to run the comparison again."""
    version = html.escape(results["environment"]["equipoise"])
    environment = "".join(
        f"<dt>{html.escape(str(term))}</dt><dd>{html.escape(str(value))}</dd>"
        for term, value in results["environment"].items()
        if value is not None
    )
    return (
        "<section><h2>Settings</h2>"
        f"<details><summary>Every run</summary>{_runs_table(results)}</details>"
        "<details><summary>Configuration and commands</summary><p>Saved as <code>compare.toml</code>, this is the "
        "whole comparison:</p>"
        f"<pre>{html.escape(tomli_w.dumps(results['settings']))}</pre>"
        f"<p>To run it again:</p><pre>pip install 'equipoise[report]=={version}'\n"
        "equipoise compare --config compare.toml</pre></details>"
        f'<details><summary>Environment</summary><dl class="meanings">{environment}</dl></details></section>'
    )


def _runs_table(results: Results) -> str:
    headings = ["Method", "Seed", "Steps", "Tokens", "FLOPs", "Loss", "Perplexity", "Kernel", "Settings of its parts"]
    lines = []
    for run in results["runs"]:
        cells = [
            str(run["seed"]),
            f"{run['steps']:,}",
            f"{run['tokens']:,}",
            f"{run['flops']:.3g}",
            f"{run['loss']:.4f}",
            f"{run['perplexity']:.3f}",
            run["kernel"],
        ]
        body = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        parts = "".join(f"<code>{html.escape(f'{key} = {value}')}</code>" for key, value in run["settings"].items())
        lines.append(f'<tr><th scope="row">{html.escape(run["method"])}</th>{body}<td>{parts}</td></tr>')
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Every run"><table class="runs"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _facts(results: Results) -> list[tuple[str, str]]:
    """Terms and values, the values as HTML."""
    data, environment = results["data"], results["environment"]
    layers = results["runs"][0]["per_layer"]
    seeds = len({run["seed"] for run in results["runs"]})
    tokens = sum(domain["train_tokens"] for domain in data["domains"].values())
    device = environment["device"]
    if environment["device"] == "cpu":
        device = f"CPU, {_plural(environment['threads'], 'thread')}"
    return [
        ("Budget of a run", f"{_power_of_ten(results['budget']['flops'])} FLOPs"),
        ("Seeds", str(seeds)),
        ("Model", f"{_plural(len(layers), 'layer')} of {_plural(len(layers[0]['load']), 'expert')}"),
        ("Data", f"{html.escape(data['source'])}, {_plural(len(data['domains']), 'domain')}"),
        ("Training text", f"{tokens / 1e6:,.1f} M tokens"),
        ("Device", html.escape(device)),
    ]


def _picture(title: str, words: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p>{_minus(words)}</p><figure>{body}</figure></section>"


def _plot(name: str, label: str, height: int | None = None) -> str:
    size = f' style="height: {height}px"' if height else ""
    return f'<div class="plot" id="{name}" role="img" aria-label="{html.escape(label)}"{size}></div>'


def _legend(results: Results) -> str:
    """One button per method, with its line; it hides the method in all pictures of lines."""
    strokes = {"solid": "", "dash": "6 4", "dot": "2 3", "dashdot": "6 3 2 3"}
    buttons = []
    for method, look in looks(results).items():
        stroke = f'stroke="var({look["colour"]})" stroke-dasharray="{strokes[look["dash"]]}"'
        buttons.append(
            f'<button type="button" aria-pressed="true" data-method="{html.escape(method)}">'
            f'<svg width="22" height="8" aria-hidden="true"><path d="M0 4h22" {stroke}/></svg>'
            f"{html.escape(look['label'])}</button>"
        )
    return f'<div class="legend" role="group" aria-label="Methods shown">{"".join(buttons)}</div>'


def _scale(words: list[str], quarter: bool = False) -> str:
    low, middle, high = words
    kind = "scale quarter" if quarter else "scale"
    return f'<div class="{kind}"><i></i><span>{low}</span><span>{middle}</span><span>{high}</span></div>'


def _options(items: Iterable[tuple[int, str]]) -> str:
    return "".join(f'<option value="{value}">{html.escape(text)}</option>' for value, text in items)


def _window(results: Results, words: str) -> str:
    run = max(results["runs"], key=lambda run: len(run["curve"]))
    return f" {words} {run['steps'] / WINDOWS:.2g} steps." if len(run["curve"]) > WINDOWS else ""


def _which_seed(results: Results) -> str:
    several = len({run["seed"] for run in results["runs"]}) > 1
    return f" Shown is seed {results['runs'][0]['seed']}." if several else ""


def _minus(text: str) -> str:
    """The text, escaped, with true minus signs where a hyphen starts it or stands alone."""
    escaped = html.escape(text)
    return f"&minus;{escaped[1:]}" if escaped.startswith("-") else escaped.replace(" - ", " &minus; ")


def _count(number: int) -> str:
    words = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve")
    return words[number] if number < len(words) else str(number)


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _power_of_ten(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} &times; 10<sup>{int(exponent)}</sup>"
