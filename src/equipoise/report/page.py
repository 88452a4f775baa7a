"""The comparison as one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from equipoise.report import figures, sections
from equipoise.report.document import document
from equipoise.report.looks import looks
from equipoise.report.results import Results, runs_by_method


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
    return document(f"Equipoise: {methods}", body, _pictures(results))


def _pictures(results: Results) -> dict[str, Any]:
    loads = enumerate(figures.load_plots(results).values())
    plots = {
        "loss": figures.loss_plot(results),
        "max-vio": figures.max_vio_plot(results),
        **{f"load-{position}": plot for position, plot in loads},
        "domain": figures.domain_plot(results),
    }
    return {"looks": looks(results), "plots": plots}
