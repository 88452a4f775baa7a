"""``equipoise replay-requests``: compare policies on requests from a file, or on generated ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from equipoise.commands import print_json
from equipoise.errors import UserError, require
from equipoise.serving.costs import Costs
from equipoise.serving.faults import parse_faults
from equipoise.serving.policies import POLICIES
from equipoise.serving.replay import ReplaySettings, Results, rate, replay
from equipoise.serving.report import headline, table, write_page
from equipoise.serving.request import Request, read_requests, truncated
from equipoise.serving.settings import DualMapSettings
from equipoise.serving.workload import SkewedWorkload

GENERATED = "skewed"
RESULTS_FILE, REPORT_FILE = "results.json", "report.html"

EXAMPLE = "equipoise replay-requests requests.jsonl --policies dual_map,affinity --replicas 8 --slo 5"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Replay serving requests through several routing policies, on simulated replicas."""

    requests: Annotated[str, tyro.conf.Positional] = GENERATED
    """JSON lines in Mooncake's format (timestamp, input_length, output_length, hash_ids), or skewed: generated."""
    policies: str = ",".join(POLICIES)
    """Policies, with commas between them."""
    replicas: int = 8
    """Replicas."""
    rate: float | None = None
    """Requests per second on average; the file's own if not given."""
    speed: float | None = None
    """Instead of a rate: 2 sends the requests twice as fast as they came."""
    slo: float = 5.0
    """Wanted time to first token, seconds."""
    num_requests: int | None = None
    """Read only the first so many requests, or generate so many; all, or 10000, if not given."""
    truncate: int | None = None
    """Cut prompts to so many tokens; the published measurements cut them to 20480."""
    warmup: int = 0
    """First requests that fill the caches and are not measured."""
    routers: int = 1
    """Routers that share the requests and do not talk to each other."""
    cache_tokens: int = Costs.cache_tokens
    """Tokens that a replica's context cache keeps."""
    faults: str = ""
    """What happens to replicas, such as die:3@120,add:8@300,hang:0@400: kind, number, seconds."""
    slo_fraction: float = DualMapSettings.slo_fraction
    """dual_map: share of the SLO that waiting prompts may take before the nearer cache is given up."""
    rebalance_multiple: float = DualMapSettings.rebalance_multiple
    """dual_map: a replica is overloaded above so many times that load; 1 or 2."""
    migration: Literal["greedy", "batch"] = DualMapSettings.migration
    """dual_map: rank moves anew after each (greedy), or once per round (batch)."""
    allow_neighbor: bool = DualMapSettings.allow_neighbor
    """dual_map: when a pair is overloaded, move requests also to a third replica."""
    seed: int = 0
    """Seed of generated requests and of ties."""
    out: Path | None = None
    """Folder for results.json and report.html; nothing is written if not given."""


def run(config: Config, as_json: bool) -> None:
    """Replay, print a table or JSON, and write the report if a folder is given. Fails: UserError for bad input."""
    if config.out is not None:
        taken = config.out / RESULTS_FILE
        require(not taken.exists(), f"{taken} exists already; choose another --out, or remove it.")
    requests = _requests(config)
    policies = [name.strip() for name in config.policies.split(",") if name.strip()]
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    tasks = {name: bar.add_task(name, total=len(requests)) for name in policies}
    with bar:
        results = replay(
            requests,
            policies,
            config.replicas,
            _settings(config, requests),
            lambda name, done: bar.update(tasks[name], completed=done),
        )
    results["settings"] = {"source": config.requests, "truncate": config.truncate} | results["settings"]
    if config.out is not None:
        _write(results, config.out)
    if as_json:
        print_json(results)
        return
    Console().print(table(results))
    print(f"{headline(results)} All simulated.")
    if config.out is not None:
        print(f"Report: {config.out / REPORT_FILE}")


def _requests(config: Config) -> list[Request]:
    require(config.num_requests is None or config.num_requests > 0, "num-requests must be at least 1.")
    require(config.truncate is None or config.truncate > 0, "truncate must be at least 1 token.")
    if config.requests == GENERATED:
        workload = SkewedWorkload(seed=config.seed)
        workload = replace(workload, num_requests=config.num_requests or workload.num_requests)
        requests = list(workload.requests())
    else:
        requests = read_requests(config.requests, config.num_requests)
    return requests if config.truncate is None else list(truncated(requests, config.truncate))


def _settings(config: Config, requests: list[Request]) -> ReplaySettings:
    require(config.rate is None or config.speed is None, "Give --rate or --speed, not both.")
    require(config.rate is None or config.rate > 0, f"rate must be above 0, not {config.rate}.")
    speed = config.rate / rate(requests) if config.rate else config.speed
    return ReplaySettings(
        slo=config.slo,
        speed=1.0 if speed is None else speed,
        warmup=config.warmup,
        routers=config.routers,
        faults=parse_faults(config.faults),
        costs=Costs(cache_tokens=config.cache_tokens),
        dual_map=DualMapSettings(
            slo_fraction=config.slo_fraction,
            rebalance_multiple=config.rebalance_multiple,
            migration=config.migration,
            allow_neighbor=config.allow_neighbor,
            seed=config.seed,
        ),
    )


def _write(results: Results, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_page(results, folder / REPORT_FILE)
        (folder / RESULTS_FILE).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot write to {folder} ({error.strerror}); make room or choose another --out.") from error
