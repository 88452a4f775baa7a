"""Train several methods alike, at equal FLOPs on the same text from the same weights, and report."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from equipoise.config import CompareConfig, TrainConfig
from equipoise.errors import UserError
from equipoise.models.decoder import Decoder
from equipoise.report.document import plotly_script
from equipoise.report.page import write_page
from equipoise.report.results import power
from equipoise.report.table import markdown
from equipoise.toml import to_dict
from equipoise.training.child import finished_run
from equipoise.training.contenders import Contender, contenders
from equipoise.training.environment import environment
from equipoise.training.flops import Ledger
from equipoise.training.metrics import read
from equipoise.training.run import (
    RUNS,
    choose_device,
    claim,
    wait_for,
    write,
    write_json,
)
from equipoise.training.schedule import bias_rate
from equipoise.training.text import Text, read_text

BUDGET_FILE = "budget.json"
RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"
TABLE_FILE = "report.md"
CALIBRATION_STEPS = 25
VALIDATIONS = 5  # per run, for the curve
RESERVE = 0.92  # of the minutes; the rest is for runs that are slower than the one that calibrated
FREE = {"methods", "seeds", "sweep", "baseline", "out"}  # finished runs stay, new ones join


def compare(config: CompareConfig) -> dict[str, Any]:
    """Train every method with every seed; write ``results.json``, ``report.html`` and its table as ``report.md``.

    Each run is a process of its own (``equipoise train``), so that its peak memory is its own. Runs that are finished
    are not repeated; one that was killed resumes.

    Returns:
        The contents of ``results.json``.
    Fails: UserError for whatever the user can mend; Interrupted after SIGINT or SIGTERM, when the run's state is saved.
    """
    config.check()
    device = choose_device(config)
    plotly_script()  # a report that cannot be written is better known before the training
    rows = contenders(config)
    _refuse_unbuildable(config, rows)
    text = read_text(config.data, config.optimizer, seed=0)
    folder = Path(config.out)
    with claim(folder, config, FREE) as resumes:
        if not resumes:
            (folder / BUDGET_FILE).unlink(missing_ok=True)
        budget = _budget(folder, config, rows, text)
        steps = {name: _steps(config, row, budget["flops"], text) for name, row in rows.items()}
        runs = [
            finished_run(_train_config(config, row, budget, steps[name], seed), text)
            | {"method": name, "notes": _notes(row, steps[name])}
            for seed in range(config.seeds)
            for name, row in rows.items()
        ]
        results = _results(config, budget, runs, environment(device, config.threads))
        write_json(folder / RESULTS_FILE, results)
        write_page(results, folder / REPORT_FILE)
        write(folder / TABLE_FILE, markdown(results))
    return results


def _refuse_unbuildable(config: CompareConfig, rows: dict[str, Contender]) -> None:
    """Say what is wrong with any method and its settings before anything is read. Fails: UserError."""
    with torch.device("meta"):
        for row in rows.values():
            Decoder(row.run(config, row.items, seed=0, out=config.out).model, vocab_size=256)


def _budget(folder: Path, config: CompareConfig, rows: dict[str, Contender], text: Text) -> dict[str, Any]:
    """FLOPs per run: as given, or once measured so that the whole comparison takes the given minutes."""
    path = folder / BUDGET_FILE
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    if config.flops is not None:
        budget = {"flops": config.flops, "minutes": None, "flops_per_second": None}
    else:
        budget = _calibrate(folder / "calibration", config, rows, text)
    write_json(path, budget)
    return budget


def _calibrate(folder: Path, config: CompareConfig, rows: dict[str, Contender], text: Text) -> dict[str, Any]:
    """Measure one short run of the baseline: its speed, and what a run costs beside its steps."""
    assert config.minutes is not None
    wait_for(folder)
    shutil.rmtree(folder)  # a measurement that was cut short cannot be resumed
    start = time.perf_counter()
    row = rows[config.baseline or next(iter(rows))]
    every = CALIBRATION_STEPS // VALIDATIONS
    probe = row.run(config, row.items, seed=0, out=str(folder))
    probe = replace(probe, steps=CALIBRATION_STEPS, flops=None, log_every=every, validate_every=every)
    done = finished_run(probe, text)
    wall = time.perf_counter() - start
    beside = wall - done["tokens"] / done["tokens_per_second"]
    # The first interval warms up memory; of the others the median, since a passing disturbance is not the rule.
    _, *warm = (record["tokens_per_second"] for record in read(folder))
    per_second = done["flops"] / done["tokens"] * statistics.median(warm)
    runs = len(rows) * config.seeds
    flops = ((config.minutes * 60 * RESERVE - wall) / runs - beside) * per_second
    if flops < done["flops"]:
        least = math.ceil((runs * (beside + done["flops"] / per_second) + wall) / 6 / RESERVE) / 10
        raise UserError(
            f"{config.minutes:g} minutes are too few for {runs} run{'s' * (runs > 1)} on this machine; give at least "
            f"{least}, or fewer methods."
        )
    return {"flops": float(f"{flops:.3g}"), "minutes": config.minutes, "flops_per_second": per_second}


def run_folder(config: CompareConfig, name: str) -> Path:
    """Where one of a comparison's runs lives."""
    return Path(config.out) / RUNS / re.sub(r"[^\w.=+-]", "-", name)


def _train_config(config: CompareConfig, row: Contender, budget: dict[str, Any], steps: int, seed: int) -> TrainConfig:
    """The run of one contender and seed, with what scales to its length."""
    run = row.run(config, row.scaled(steps), seed, out=str(run_folder(config, f"{row.name}-seed{seed}")))
    every = max(1, steps // 100)
    return replace(
        run,
        flops=budget["flops"],
        log_every=every,
        validate_every=max(1, steps // VALIDATIONS),
        checkpoint_every=max(50, steps // 4),
    )


def _steps(config: CompareConfig, row: Contender, flops: float, text: Text) -> int:
    """The steps that these FLOPs are planned to buy."""
    with torch.device("meta"):
        run = row.run(config, row.items, seed=0, out=config.out)
        model = Decoder(run.model, text.tokenizer.vocab_size)
    seq_len = config.data.seq_len
    return max(1, Ledger.of(model, seq_len).steps(flops, config.optimizer.batch_size * seq_len))


def _results(
    config: CompareConfig, budget: dict[str, Any], runs: list[dict[str, Any]], where: dict[str, Any]
) -> dict[str, Any]:
    text = runs[0]["text"]
    results: dict[str, Any] = {
        "environment": where,
        "settings": to_dict(config),
        "budget": budget,
        "data": {"source": config.data.source, **text},
        "baseline": config.baseline or runs[0]["method"],
        "runs": [{key: value for key, value in run.items() if key != "text"} for run in runs],
    }
    return results | {"power": power(results)}


def _notes(row: Contender, steps: int) -> list[str]:
    """What a reader must know to read a contender's row rightly."""
    notes = []
    if row.scales_bias:
        notes.append(f"bias.rate is {bias_rate(steps):.2g}, scaled to the {steps} steps of the run.")
    if not row.method.causal:
        notes.append("Validated with every token choosing its top K, since experts cannot choose left to right.")
    return notes
