"""The columns and the footnotes of the one table that the terminal, the Markdown and the page show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from equipoise.report.results import Results, Row, perplexity_digits

PLUS_MINUS = "\u00b1"
DAGGER = "\u2020"
NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: with the unit.
        heading: the title in narrow lines, so that the terminal's table fits into 80 columns.
        meaning: what the number says, in plain words.
        cell: the row's text.
        spread: the row's standard deviation or error, as text; empty where there is none.
        grey: whether the row's number may be chance alone.
    """

    title: str
    heading: str
    meaning: str
    cell: Callable[[Row], str]
    spread: Callable[[Row], str] = lambda row: ""
    grey: Callable[[Row], bool] = lambda row: False

    def text(self, row: Row) -> str:
        """The cell, and after a space its spread."""
        return f"{self.cell(row)} {self.spread(row)}".rstrip()


def name(row: Row) -> str:
    """The method's name; a dagger marks one that is not causal."""
    return row.method if row.causal else f"{row.method} {DAGGER}"


def columns(results: Results, rows: list[Row]) -> list[Column]:
    """All columns but the method's name; the paired difference only where several seeds allow one."""
    digits = perplexity_digits(rows)
    with_difference = any(row.difference is not None for row in rows)
    return [
        _perplexity(digits),
        *([_difference(results["baseline"], digits)] if with_difference else []),
        *_balance(rows),
        Column(
            "Specialisation",
            "Special-\nisation",
            "Mutual information between domain and expert over the entropy of the domain: 0, a token's expert says "
            "nothing about the domain it comes from; 1, it gives the domain away.",
            lambda row: f"{row.specialisation:.3f}",
        ),
        *_cost(rows),
    ]


def footnotes(results: Results, rows: list[Row]) -> list[str]:
    """What the table has to say once, below: its power, its daggers, and what the runs noted."""
    notes = [results["power"]]
    if not all(row.causal for row in rows):
        notes.append(f"{DAGGER} Trained seeing later tokens, so its training loss is not comparable.")
    noted = [f"{run['method']}: {note}" for run in results["runs"] for note in run["notes"]]
    return notes + list(dict.fromkeys(noted))


def _perplexity(digits: int) -> Column:
    def spread(row: Row) -> str:
        return "" if row.perplexity_sd is None else f"{PLUS_MINUS}{row.perplexity_sd:.{digits}f}"

    return Column(
        "Perplexity",
        "Perplex-\nity",
        f"Of the validation text, mean over the seeds; lower is better. {PLUS_MINUS} is the standard deviation over "
        "seeds.",
        lambda row: f"{row.perplexity:.{digits}f}",
        spread=spread,
    )


def _difference(baseline: str, digits: int) -> Column:
    def cell(row: Row) -> str:
        return NOTHING if row.difference is None else f"{row.difference:+.{digits}f}"

    def spread(row: Row) -> str:
        return "" if row.difference_se is None else f"{PLUS_MINUS}{row.difference_se:.{digits}f}"

    return Column(
        f"Difference to {baseline}",
        "Differ-\nence",
        f"Perplexity minus that of {baseline} with the same seed, mean over the seeds. {PLUS_MINUS} is its standard "
        "error. Grey where the 95 % interval includes zero: chance alone may explain it.",
        cell,
        spread=spread,
        grey=lambda row: row.difference_is_clear is False,
    )


def _balance(rows: list[Row]) -> list[Column]:
    totals = {row.experts for row in rows}
    of_total = f"of {totals.pop()}" if len(totals) == 1 else ""
    return [
        Column(
            "MaxVio global",
            "MaxVio\nglobal",
            "(largest load - mean load) / mean load over the whole validation set, mean over layers: 0 is balanced, 1 "
            "means that one expert does twice its share.",
            lambda row: f"{row.max_vio_global:.2f}",
        ),
        Column(
            "MaxVio batch",
            "MaxVio\nbatch",
            "The same within one batch, which is what a device has to wait for.",
            lambda row: f"{row.max_vio_batch:.2f}",
        ),
        Column(
            f"Dead experts {of_total}".rstrip(),
            f"Dead\n{of_total}",
            "Experts that got no token of the validation set, all layers together, mean over the seeds.",
            lambda row: f"{row.dead_experts:.3g}",
        ),
        Column(
            "Load entropy",
            "Load\nentr.",
            "How evenly the load is spread: 1 is even, 0 is everything on one expert.",
            lambda row: f"{row.load_entropy:.3f}",
        ),
    ]


def _cost(rows: list[Row]) -> list[Column]:
    in_gigabytes = max(row.peak_memory_bytes for row in rows) >= 1e9
    unit, scale, digits = ("GB", 1e9, 2) if in_gigabytes else ("MB", 1e6, 0)
    return [
        Column("Tokens/s", "Tokens\n/s", "Tokens trained per second.", lambda row: f"{row.tokens_per_second:,.0f}"),
        Column(
            f"Peak memory, {unit}",
            f"Peak\n{unit}",
            "The most memory that training took.",
            lambda row: f"{row.peak_memory_bytes / scale:.{digits}f}",
        ),
    ]
