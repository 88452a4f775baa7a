"""Which replica gets a request: all policies, several loads, 8 and 32 simulated replicas, all in one run.

``python benchmarks/serving.py --trace conversation=FILE synthetic=FILE --million`` replays Mooncake's traces
(kvcache-ai/Mooncake, FAST25-release) and generated requests, writes ``benchmarks/results/serving.json``, and from it
``docs/evidence/serving.md``. ``--tables`` makes the page again from the JSON. Without traces: the generated ones only.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import serving_tables
from rich.progress import track

from equipoise.serving import (
    DualMapSettings,
    ReplaySettings,
    Request,
    SkewedWorkload,
    read_requests,
    replay,
    truncated,
)
from equipoise.training.environment import environment

ROOT = Path(__file__).parents[1]
SPEEDS = {
    "conversation": (1.0, 1.25, 1.5, 1.75, 2.0),
    "synthetic": (1.0, 1.25, 1.5, 1.75, 2.0),
    "skewed": (1.5, 2.0, 2.25, 2.5, 2.75),
}  # times a trace's own rate, for 8 replicas; four times as fast for 32
REPLICAS = (8, 32)
WARMUP, LONGEST = 500, 20_480  # as published
ROUTERS = 4  # that do not talk, besides one that sees all
VARIANTS = {
    "as configured": {},
    "SLO fraction 1": {"slo_fraction": 1.0},
    "overload at twice that": {"rebalance_multiple": 2.0},
    "moves ranked once": {"migration": "batch"},
    "neighbours allowed": {"allow_neighbor": True},
    "no moves, no longest wait": {"rebalance_multiple": 1e9, "max_wait": 1e9},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", nargs="*", default=[], help="conversation=FILE synthetic=FILE")
    parser.add_argument("--million", action="store_true", help="also time 1,000,000 requests and 64 replicas")
    parser.add_argument("--routers", action="store_true", help="only measure several routers again")
    parser.add_argument("--tables", action="store_true", help="only make the page again")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/serving.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/evidence/serving.md")
    options = parser.parse_args()
    traces = dict(trace.split("=", 1) for trace in options.trace)
    if options.routers:
        found = json.loads(options.out.read_text(encoding="utf-8")) | several_routers(traces)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    elif not options.tables:
        found = {"benchmark": "serving", "environment": environment(threads=1), **measure(traces)}
        if options.million:
            found["million"] = million()
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    options.page.write_text(serving_tables.page(json.loads(options.out.read_text(encoding="utf-8"))), encoding="utf-8")


def measure(traces: dict[str, str]) -> dict[str, Any]:
    """Every workload at every speed and size, and the variants of dual_map at 8 replicas."""
    workloads = read(traces)
    points = [(name, size, speed) for name in workloads for size in REPLICAS for speed in SPEEDS[name]]
    runs = [_point(name, workloads[name], size, speed) for name, size, speed in track(points, "Policies")]
    variants = [
        {"variant": label, **_point(name, workloads[name], 8, speed, ["dual_map"], options)}
        for name in track(workloads, "Variants")
        for speed in SPEEDS[name]
        for label, options in VARIANTS.items()
    ]
    several = several_routers(traces)
    return {"warmup": WARMUP, "longest_prompt": LONGEST, "runs": runs, "variants": variants, **several}


def several_routers(traces: dict[str, str]) -> dict[str, Any]:
    """Every workload at every speed with routers that do not talk, at 8 replicas."""
    workloads = read(traces)
    points = [(name, speed) for name in workloads for speed in SPEEDS[name]]
    runs = [
        _point(name, workloads[name], 8, speed, routers=ROUTERS) for name, speed in track(points, "Several routers")
    ]
    return {"routers": runs, "routers_environment": environment(threads=1)}


def read(traces: dict[str, str]) -> dict[str, list[Request]]:
    """The workloads by name."""
    workloads = {name: list(truncated(read_requests(path), LONGEST)) for name, path in traces.items()}
    return workloads | {"skewed": list(SkewedWorkload().requests())}


def million() -> dict[str, Any]:
    """The largest replay that is promised."""
    requests = list(SkewedWorkload(num_requests=1_000_000, rate=60.0).requests())
    start, cpu = time.perf_counter(), time.process_time()
    found = replay(requests, ["dual_map"], 64)["policies"]["dual_map"]
    seconds = {"wall_seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    return seconds | {key: found[key] for key in ("capacity", "router_ms", "entries", "moved")}


def _point(
    name: str,
    requests: list[Request],
    size: int,
    speed: float,
    policies: list[str] | None = None,
    options: dict[str, Any] | None = None,
    routers: int = 1,
) -> dict[str, Any]:
    settings = ReplaySettings(
        speed=speed * size / 8, warmup=WARMUP, routers=routers, dual_map=DualMapSettings(**(options or {}))
    )
    found = replay(requests, *([policies] if policies else []), replicas=size, settings=settings)
    for policy in found["policies"].values():
        del policy["ttft_percentiles"], policy["capacity_over_time"]
    return {"workload": name, "replicas": size, "speed": speed, **found}


if __name__ == "__main__":
    main()
