"""``equipoise simulate``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.commands import print_json
from equipoise.errors import UserError, require

if TYPE_CHECKING:
    from equipoise.diagnosis.trace import Trace
    from equipoise.simulator.calibrate import Fitted, Measurement
    from equipoise.simulator.cluster import Cluster
    from equipoise.simulator.results import Facts
    from equipoise.simulator.simulation import Settings, Simulation

EXAMPLE = "equipoise simulate --workload zipf:1.2 --cluster h200x8:16 --policy native,least-loaded"
RESULTS_FILE, REPORT_FILE = "results.json", "report.html"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Simulate what policies of expert parallelism would cost on a cluster."""

    trace: Path | None = None
    """Folder of a trace; give this or a workload."""
    workload: str | None = None
    """Made-up loads: balanced, zipf:EXPONENT[:DRIFT] or hot:SHARE:EXPERTS; zipf:1.2 without a trace."""
    cluster: str = "h200x8:16"
    """Machine and ranks: h200x8, h100x8, a100x8, v100x8, gb200x72 or a .toml file, such as h200x8:16."""
    policy: str = "native,placed,replicas,least-loaded,sharded-sparse,shadow"
    """Policies, with commas between them; the first is what the others are measured against."""
    model: str = "deepseek-v3"
    """Sizes of a known model: gpt-oss-120b, deepseek-v3, kimi-k2 or mixtral-8x7b."""
    dim: int | None = None
    """Width of the model, in place of the model's own."""
    hidden_dim: int | None = None
    """Hidden width of an expert, in place of the model's own."""
    num_experts: int | None = None
    """Experts of a layer, in place of the model's or the trace's own."""
    top_k: int | None = None
    """Experts per token, in place of the model's or the trace's own."""
    num_layers: int | None = None
    """Expert layers, in place of the model's or the trace's own."""
    ep: int | None = None
    """Ranks of an expert-parallel group; the largest that divides the cluster if not given."""
    tokens: int = 8192
    """Tokens of a rank and step."""
    forward_only: bool = False
    """Leave the backward pass out."""
    windows: int = 2
    """Windows of a workload; the first is only history for the others."""
    seed: int = 0
    """Seed of a workload."""
    calibrate: Path | None = None
    """JSON with measured points, to which the machine's constants are fitted first."""
    out: Path | None = None
    """Folder for results.json and report.html; nothing is written if not given."""


def run(config: Config, as_json: bool) -> None:
    """Simulate, print a table or JSON, and write the report if a folder is given. Fails: UserError for bad input."""
    from rich.console import Console

    from equipoise.simulator.results import facts, headline, table

    if config.out is not None:
        taken = config.out / RESULTS_FILE
        require(not taken.exists(), f"{taken} exists already; choose another --out, or remove it.")
    simulation, fitted, points = _simulate(config)
    found = facts(simulation)
    if fitted is not None:
        found["calibration"] = _calibration_facts(fitted, points)
    if config.out is not None:
        _write(found, config.out)
    if as_json:
        print_json(found)
        return
    Console().print(table(found))
    print(headline(found))
    if fitted is not None:
        worst = max(abs(error) for error in fitted.errors)
        print(f"Calibrated on {len(points)} points; the largest error is {worst:.1%}.")
    if config.out is not None:
        print(f"Report: {config.out / REPORT_FILE}")


def _simulate(config: Config) -> tuple[Simulation, Fitted | None, list[Measurement]]:
    from equipoise.simulator.calibrate import calibrate, read_measurements
    from equipoise.simulator.cluster import read_cluster

    cluster = read_cluster(config.cluster)
    points, fitted = [], None
    if config.calibrate is not None:
        points, names = read_measurements(config.calibrate)
        fitted = calibrate(cluster, points, names)
        cluster = fitted.cluster
    source = _source(config)
    return _with_progress(source, cluster, config.policy, _settings(config, source)), fitted, points


def _source(config: Config) -> Trace | str:
    require(config.trace is None or config.workload is None, "Give --trace or --workload, not both.")
    if config.trace is None:
        return config.workload or "zipf:1.2"
    from equipoise.diagnosis.trace_files import read_trace

    return read_trace(config.trace)


def _settings(config: Config, source: Trace | str) -> Settings:
    """The model's sizes, those that a trace knows better, and those that were given."""
    from equipoise.simulator.shape import find_shape
    from equipoise.simulator.simulation import Settings

    shape = find_shape(config.model)
    known: dict[str, Any] = {}
    if not isinstance(source, str):
        known = {"num_layers": source.load_WLE.shape[1], "num_experts": source.num_experts, "top_k": source.top_k}
    names = ("dim", "hidden_dim", "num_experts", "top_k", "num_layers")
    given = {name: getattr(config, name) for name in names}
    changes = {name: value for name, value in (known | _present(given)).items() if value is not None}
    changed = replace(shape, **changes)
    named = changed if changed == shape else replace(changed, name=f"{shape.name}, changed")
    return Settings(
        shape=named,
        ep=config.ep,
        tokens=config.tokens,
        training=not config.forward_only,
        windows=config.windows,
        seed=config.seed,
    )


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _with_progress(source: Trace | str, cluster: Cluster, policies: str, settings: Settings) -> Simulation:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from equipoise.simulator.simulation import layers_to_simulate, simulate

    names = [name.strip() for name in policies.split(",")]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        total = layers_to_simulate(source, settings)
        tasks = {name: bar.add_task(name, total=total) for name in names}
        return simulate(source, cluster, names, settings, lambda name: bar.advance(tasks[name]))


def _calibration_facts(fitted: Fitted, points: list[Measurement]) -> Facts:
    return {
        "constants": fitted.constants,
        "points": [
            {
                "name": f"{point.shape.name}, {point.workload}, {point.policy}, {point.ranks} ranks",
                "measured": point.measured,
                "error": error,
            }
            for point, error in zip(points, fitted.errors)
        ],
    }


def _write(found: Facts, folder: Path) -> None:
    import json

    from equipoise.simulator.report import page

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REPORT_FILE).write_text(page(found), encoding="utf-8")
        (folder / RESULTS_FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot write to {folder} ({error.strerror}); make room or choose another --out.") from error
