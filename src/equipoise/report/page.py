"""The comparison as one self-contained HTML file."""

from __future__ import annotations

import html
import json
from importlib import resources
from pathlib import Path
from typing import Any

from equipoise.errors import UserError
from equipoise.report import figures, sections
from equipoise.report.looks import looks
from equipoise.report.results import Results, runs_by_method

# Nothing may be loaded from anywhere: the page works offline, and says so to the browser.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"

STYLES = ("theme.css", "page.css", "pictures.css")


def write_page(results: Results, path: str | Path) -> None:
    """Write the report as one HTML file of at most 6 MB that needs no network.

    Args:
        results: the content of `results.json`.
        path: the file; its folder must exist.

    Fails: UserError without plotly.
    """
    Path(path).write_text(_page(results), encoding="utf-8")


def _page(results: Results) -> str:
    methods = ", ".join(runs_by_method(results))
    body = "".join(
        section(results)
        for section in (
            sections.header,
            sections.results_table,
            sections.loss_section,
            sections.max_vio_section,
            sections.load_section,
            sections.domain_section,
            sections.settings_section,
        )
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Equipoise: {html.escape(methods)}</title>
<style>{"".join(map(_data_file, STYLES))}</style>
</head>
<body>
<main>
{body}
<noscript><p>The pictures need JavaScript; the tables do not.</p></noscript>
</main>
<script type="application/json" id="data">{_json(_pictures(results))}</script>
<script>{plotly_script()}</script>
<script>{_data_file("page.js")}</script>
</body>
</html>
"""


def _pictures(results: Results) -> dict[str, Any]:
    loads = enumerate(figures.load_plots(results).values())
    plots = {
        "loss": figures.loss_plot(results),
        "max-vio": figures.max_vio_plot(results),
        **{f"load-{position}": plot for position, plot in loads},
        "domain": figures.domain_plot(results),
    }
    return {"looks": looks(results), "plots": plots}


def _json(value: Any) -> str:
    """JSON that no string in it can break out of: inside a script element only `<` could."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def plotly_script() -> str:
    """The library that draws the plots. Fails: UserError where it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError("The report needs plotly: pip install 'equipoise[report]'.") from error
    return get_plotlyjs()


def _data_file(name: str) -> str:
    return resources.files("equipoise.report").joinpath(name).read_text(encoding="utf-8")
