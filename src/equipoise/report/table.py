"""The comparison's table, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from equipoise.report.columns import PLUS_MINUS, Column, columns, footnotes, name
from equipoise.report.results import Results, Row, summarise


class _Heading:
    """A heading that breaks its hyphenated words only where the column is narrow."""

    def __init__(self, narrow: str):
        self.narrow, self.wide = Text(narrow), Text(narrow.replace("-\n", ""))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widest = [max(line.cell_len for line in text.split("\n")) for text in (self.narrow, self.wide)]
        return Measurement(*widest)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        _, wide = self.__rich_measure__(console, options)
        yield self.wide if wide <= options.max_width else self.narrow


def table(results: Results) -> Table:
    """The comparison as a rich table, readable from 80 columns on; footnotes stand in its caption."""
    rows = summarise(results)
    notes = footnotes(results, rows)
    if any(row.difference is not None for row in rows):
        notes.insert(
            1,
            f"Perplexity {PLUS_MINUS} standard deviation over seeds; difference to {results['baseline']} with the same "
            f"seed {PLUS_MINUS} standard error, dim where chance alone may explain it (95 %).",
        )
    shown = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        header_style="bold",
        caption=Text("\n".join(["", *notes])),
        caption_justify="left",
        caption_style="dim",
    )
    shown.add_column("Method", no_wrap=True)
    several = columns(results, rows)
    for column in several:
        shown.add_column(_Heading(column.heading), justify="right")
    for row in rows:
        shown.add_row(Text(name(row)), *(_cell(column, row) for column in several))
    return shown


def markdown(results: Results) -> str:
    """The comparison as a Markdown table with its footnotes."""
    rows = summarise(results)
    several = columns(results, rows)
    lines = [
        ["Method", *(column.title for column in several)],
        ["---", *("---:" for _ in several)],
        *([name(row), *(column.text(row) for column in several)] for row in rows),
    ]
    body = "\n".join("| " + " | ".join(map(_escape, cells)) + " |" for cells in lines)
    return body + "\n\n" + "\n\n".join(map(_escape, footnotes(results, rows))) + "\n"


def _cell(column: Column, row: Row) -> Text:
    return Text(column.text(row), style="dim" if column.grey(row) else "")


def _escape(text: str) -> str:
    return text.translate({ord(mark): f"\\{mark}" for mark in "\\|*_<"})
