"""A grid of model sizes at several budgets, trained for every method: what scaling laws are fitted to."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from equipoise.config import CompareConfig, ModelConfig, TrainConfig
from equipoise.errors import require
from equipoise.models.decoder import Decoder
from equipoise.scaling.planning import PlannedRun, plan_isoflop
from equipoise.training.child import finished_run
from equipoise.training.compare import run_folder
from equipoise.training.contenders import Contender, contenders
from equipoise.training.flops import Ledger
from equipoise.training.run import claim, write
from equipoise.training.text import read_text

RUNS_FILE = "isoflop.csv"
COLUMNS = ("method", "params", "total", "tokens", "flops", "loss", "seed", "dim")
FREE = {"methods", "seeds", "sweep", "baseline", "out", "isoflop"}
WIDEST = 8  # times the configuration's own width


@dataclass(frozen=True)
class Size:
    """One model of the grid.

    Attributes:
        model: its configuration.
        params: parameters that a token visits.
        total: parameters in all.
        ledger: what training it costs.
    """

    model: ModelConfig
    params: int
    total: int
    ledger: Ledger

    @property
    def flops_per_token(self) -> float:
        """Of training at the last K of a schedule, which ``params`` counts, too."""
        return float(self.ledger.per_token(max(self.ledger.plan)).total)


def isoflop(config: CompareConfig) -> Path:
    """Train the grid of every contender and write one line per run.

    Widths vary, and the experts' hidden width with them; layers, heads, experts and the learning rate stay. Runs that
    are finished are not repeated, so a budget or a method may be added later.

    Returns:
        The CSV file, in the form that ``read_runs`` takes.
    Fails: UserError for whatever the user can mend; Interrupted after SIGINT or SIGTERM.
    """
    config.check()
    rows = contenders(config)
    text = read_text(config.data, config.optimizer, seed=0)
    folder = Path(config.out)
    lines = []
    known = len(_saved(folder / RUNS_FILE))
    grids = {name: _grid(config, row, text.tokenizer.vocab_size) for name, row in rows.items()}
    with claim(folder, config, FREE):
        for seed in range(config.seeds):
            for name, (sizes, plan) in grids.items():
                for planned in plan:
                    size = sizes[planned.size]
                    result = finished_run(_run(config, rows[name], size, planned, seed), text)
                    values = (size.params, size.total, result["tokens"], result["flops"], result["loss"])
                    lines.append((name, *values, seed, size.model.dim))
                    if len(lines) >= known:  # a file that is there is not cut short by a run that is resumed
                        _save(folder / RUNS_FILE, lines)
    return folder / RUNS_FILE


def budgets(config: CompareConfig) -> list[float]:
    """The budgets in FLOPs. Fails: UserError for one that is no number above 0."""
    assert config.isoflop is not None
    try:
        values = [float(word) for word in config.isoflop.split(",")]
    except ValueError:
        values = [0.0]
    require(min(values) > 0, f"isoflop must list budgets above 0, such as 1e11,3e11,1e12, not {config.isoflop}.")
    names = {f"{value:g}" for value in values}  # of folders
    require(len(names) == len(set(values)), "The budgets of isoflop must differ in their first six digits.")
    return values


def _grid(config: CompareConfig, row: Contender, vocab_size: int) -> tuple[list[Size], tuple[PlannedRun, ...]]:
    """The sizes that one method may have, and which of them to train at which budget."""
    base = row.run(config, row.items, seed=0, out=config.out).model
    step = 2 * base.num_heads
    sizes = [_size(base, dim, vocab_size, config.data.seq_len) for dim in range(step, WIDEST * base.dim + 1, step)]
    params = [float(size.params) for size in sizes]
    return sizes, plan_isoflop(budgets(config), params, lambda index: sizes[index].flops_per_token)


def _size(base: ModelConfig, dim: int, vocab_size: int, seq_len: int) -> Size:
    model = replace(base, dim=dim, hidden_dim=max(1, round(base.hidden_dim * dim / base.dim)))
    with torch.device("meta"):
        decoder = Decoder(model, vocab_size)
    total = sum(weight.numel() for weight in decoder.parameters())
    pools = {id(layer.moe.experts): layer.moe for layer in decoder.layers if layer.moe is not None}
    routed = sum(weight.numel() for moe in pools.values() for weight in moe.experts.parameters())
    ledger = Ledger.of(decoder, seq_len)
    visited = sum(rows * row for rows, row in zip(ledger.plan[max(ledger.plan)], ledger.row)) / 2
    return Size(model, round(total - routed + visited), total, ledger)


def _run(config: CompareConfig, row: Contender, size: Size, planned: PlannedRun, seed: int) -> TrainConfig:
    """One run of the grid; it logs and saves little, since there are many of them."""
    steps = max(1, size.ledger.steps(planned.budget, config.optimizer.batch_size * config.data.seq_len))
    name = f"{row.name}-{planned.budget:g}-dim{size.model.dim}-seed{seed}"
    run = row.run(config, row.scaled(steps), seed, out=str(run_folder(config, name)))
    model = replace(run.model, dim=size.model.dim, hidden_dim=size.model.hidden_dim)
    every = max(1, steps // 10)
    return replace(run, model=model, flops=planned.budget, log_every=every, checkpoint_every=max(50, steps))


def _saved(path: Path) -> list[str]:
    """The lines of runs in the file, if there is one."""
    return path.read_text(encoding="utf-8").splitlines()[1:] if path.is_file() else []


def _save(path: Path, lines: list[tuple]) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([COLUMNS, *lines])
    write(path, file.getvalue())
