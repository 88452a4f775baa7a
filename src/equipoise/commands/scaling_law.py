"""``equipoise scaling-law``: fit laws to a file of runs, recommend, compare, report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from equipoise.commands import print_json
from equipoise.errors import UserError, require
from equipoise.scaling.allocation import Candidates
from equipoise.scaling.fit import FitSettings, fit_runs
from equipoise.scaling.law import ScalingLaw
from equipoise.scaling.report import page
from equipoise.scaling.runs import read_runs
from equipoise.scaling.summary import Summary, default_budget, summarise
from equipoise.scaling.wording import SIZES, bounds, count, number, ranged
from equipoise.toml import save

REPORT_FILE, RESULTS_FILE, CONFIG_FILE = "report.html", "results.json", "config.toml"

EXAMPLE = "equipoise scaling-law runs.csv --flops 1e18 --out runs/law"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fit a scaling law to finished runs; with a column `method`, one law per method and where they cross."""

    runs: Annotated[str, tyro.conf.Positional]
    """CSV or JSON with params, tokens, loss; optional flops, total, granularity, method."""
    flops: tuple[float, ...] = ()
    """Budgets to recommend a model for; ten times the largest measured one if not given."""
    extra: tuple[Literal["total", "sparsity", "granularity"], ...] = ()
    """Terms for Mixture-of-Experts: total and sparsity read the column total, granularity its own."""
    experts: tuple[int, ...] = ()
    """With extra terms: numbers of experts to choose among."""
    granularities: tuple[float, ...] = (1.0,)
    """With extra terms: how many times finer the experts may be."""
    top_k: int = 1
    """With extra terms: experts per token at granularity 1."""
    max_total: float | None = None
    """With extra terms: parameters that fit into memory; no limit if not given."""
    solver: Literal["nelder-mead", "l-bfgs-b", "grid"] = "nelder-mead"
    """Search of the exponents: nelder-mead, l-bfgs-b with the analytic gradient, or a grid in steps of 0.01."""
    inner: Literal["nnls", "ols"] = "nnls"
    """Solution of the coefficients: nnls keeps them at or above 0, ols does not."""
    huber: float | None = None
    """Residuals beyond so many nats count linearly; least squares if not given."""
    bootstraps: int = 1000
    """Refits behind the intervals; 0 for none."""
    confidence: float = 0.95
    """Share of the intervals."""
    seed: int = 0
    """Seed of the refits."""
    out: str | None = None
    """Folder for report.html, results.json and the resolved configuration; none if not given."""

    def settings(self) -> FitSettings:
        """How to fit. Fails: UserError at the first value that is not allowed."""
        names = ("extra", "solver", "inner", "huber", "bootstraps", "confidence", "seed")
        settings = FitSettings(**{name: getattr(self, name) for name in names})
        settings.check()
        return settings

    def candidates(self) -> Candidates | None:
        """The expert models to choose among; None without ``experts``. Fails: UserError where they have no use."""
        if not self.experts:
            return None
        require(
            bool(self.extra), "Experts can only be chosen by a law with terms for them; give --extra total sparsity."
        )
        chosen = Candidates(
            experts=self.experts, granularities=self.granularities, top_k=self.top_k, max_total=self.max_total
        )
        chosen.check()
        return chosen


def run(config: Config, as_json: bool) -> None:
    """Fit, print and, with ``out``, save.

    Fails: UserError for settings that are not allowed and as ``read_runs`` and ``fit_scaling_law``; nothing is written.
    """
    settings, candidates = config.settings(), config.candidates()
    require(all(0 < flops < float("inf") for flops in config.flops), "Budgets given by --flops must be above 0.")
    laws = {}
    for method, runs in read_runs(config.runs).items():
        try:
            laws[method] = fit_runs(runs, settings, progress=not as_json)
        except UserError as error:
            raise UserError(f"{method}: {error}" if method else str(error)) from error
    budgets = config.flops or (default_budget(laws),)
    summary = summarise(laws, sorted(budgets), candidates)
    if config.out is not None:
        _write(config, laws, summary, max(budgets))
    if as_json:
        print_json(summary)
        return
    _show(summary, config)


def _write(config: Config, laws: dict[str, ScalingLaw], summary: Summary, high: float) -> None:
    """The folder of results. Everything is ready before anything is written."""
    folder = Path(str(config.out))
    text = page(laws, summary, Path(config.runs).name, high)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REPORT_FILE).write_text(text, encoding="utf-8")
        (folder / RESULTS_FILE).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        save(config, folder / CONFIG_FILE)
    except OSError as error:
        raise UserError(f"Cannot write to {folder}: {error.strerror}.") from error


def _show(summary: Summary, config: Config) -> None:
    console = Console()
    for method, law in summary["laws"].items():
        title = f"{method}, " if method else ""
        table = _table(f"{title}{law['runs']} runs", "parameter", "value", f"{config.confidence:.0%} interval")
        for name, values in law["parameters"].items():
            table.add_row(name, number(values["value"]), bounds(values))
        console.print(table)
        console.print()
        if law.get("optima"):
            console.print(_optima(law))
            console.print()
        if "comparison" in law:
            _print_comparison(law["comparison"])
        for sentence in law["warnings"]:
            print(f"Warning: {sentence}")
    for crossing in summary["crossings"]:
        print(crossing["sentence"])
    if config.out is not None:
        print(f"Report: {Path(config.out) / REPORT_FILE}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _optima(law: Summary) -> Table:
    experts = ("experts", "granularity", "total") if "experts" in law["optima"][0] else ()
    table = _table("Best model for a budget", "FLOPs", *SIZES)
    for name in experts:
        table.add_column(name, justify="right", no_wrap=True)
    for best in law["optima"]:
        sizes = [ranged(best[name], words).replace(" (", "\n(") for name, words in SIZES.items()]
        table.add_row(f"{best['flops']:.2g}", *sizes, *(count(best[name]) for name in experts))
    if law["optima"][-1].get("at_edge"):
        table.caption = f"At the edge of the candidates: {', '.join(law['optima'][-1]['at_edge'])}; offer more."
    return table


def _print_comparison(known: Summary) -> None:
    third = known["approach3"]
    print(f"Approach 3: a = {third['a']:.4f}, {count(third['params'])} params at {known['flops']:.2g} FLOPs.")
    if "approach2" not in known:
        print(f"Approach 2: {known['approach2_refused']}")
        return
    second, bias = known["approach2"], known["approach2_bias"]
    off = "unknown" if bias["tokens"] is None else f"{bias['tokens']:+.1%}"
    print(
        f"Approach 2: a = {second['a']:.4f}, {count(second['params'])} params; on this grid its shape alone adds "
        f"{bias['a']:+.4f} to a and {off} to the tokens."
    )
