"""Quality and time of placements: ``python benchmarks/placement.py [--runs 9]`` writes ``results/placement.json``.

Loads are made up (``diagnosis/synthetic.py``): Zipf's skew, drift, domains that take turns, affinity between layers.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from equipoise.diagnosis.synthetic import Workload, make_loads, make_trace
from equipoise.diagnosis.trace import Trace
from equipoise.placement import Placement, Settings, place
from equipoise.placement.traffic import flows, remote_share
from equipoise.training.environment import environment

HISTORY = 8  # windows that a plan is made from; the next one is what it is judged by
SLOW = {
    "drifting": Workload(layers=4, num_experts=64, windows=20, zipf=0.8, drift=0.1, tokens=16384, top_k=8),
    "drifting fast": Workload(layers=4, num_experts=64, windows=20, zipf=0.8, drift=0.3, tokens=16384, top_k=8),
    "changing domains": Workload(
        layers=4, num_experts=64, windows=20, zipf=0.6, drift=0.05, domains=3, switch_every=2, tokens=16384, top_k=8
    ),
    "standing still": Workload(layers=4, num_experts=64, windows=20, zipf=0.8, drift=0.0, tokens=16384, top_k=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/placement.json")
    options = parser.parse_args()
    result = {
        "environment": environment(torch.device("cpu")),
        "load_average_before": os.getloadavg()[0],
        "one layer, 64 experts on 8 devices": one_layer(options.runs),
        "60 layers, 256 experts on 64 devices": large(options.runs),
        "next window": {name: next_window(load, options.runs) for name, load in SLOW.items()},
        "affinity": affinity(options.runs),
        "load_average_after": os.getloadavg()[0],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles, extremes."""
    low, median, high = statistics.quantiles(values, n=4)
    facts = {"median": median, "quartile_1": low, "quartile_3": high, "least": min(values), "most": max(values)}
    return {name: round(value, 5) for name, value in facts.items()} | {"runs": len(values)}


def timed(*args: Any, **settings: Any) -> tuple[Placement, float]:
    start = time.perf_counter()
    placement = place(*args, **settings)
    return placement, time.perf_counter() - start


def one_layer(runs: int) -> dict[str, Any]:
    """Packing and both exact solvers, against the proven bound."""
    found: dict[str, Any] = {}
    for zipf in (0.3, 0.5, 0.8):
        for replicas in (0, 16):
            for solver in ("pack", "auto", "exact", "cp_sat"):
                gaps, seconds = [], []
                for seed in track(range(runs), f"one layer, zipf {zipf}, {replicas} replicas, {solver}"):
                    trace = make_loads(Workload(layers=1, windows=1, zipf=zipf, tokens=65536, top_k=8, seed=seed))
                    settings = Settings(seconds=4.0)
                    placement, took = timed(trace, 8, replicas=replicas, solver=solver, settings=settings)
                    gaps.append(placement.gap or 0.0)
                    seconds.append(took)
                found[f"zipf {zipf}, {replicas} replicas, {solver}"] = {"gap": spread(gaps), "seconds": spread(seconds)}
    return found


def large(runs: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for replicas in (0, 64):
        gaps, seconds = [], []
        for seed in track(range(runs), f"60 layers, {replicas} replicas"):
            load = Workload(layers=60, num_experts=256, windows=8, tokens=65536, top_k=8, seed=seed)
            placement, took = timed(make_loads(load), 64, nodes=8, replicas=replicas)
            gaps.append(placement.gap or 0.0)
            seconds.append(took)
        found[f"{replicas} replicas"] = {"gap": spread(gaps), "seconds": spread(seconds)}
    return found


def next_window(load: Workload, runs: int) -> dict[str, Any]:
    """The fullest device in the window after the plan, ours and EPLB's with the same replicas."""
    found = {}
    for replicas in (0, 16):
        ours, eplb, above = [], [], []
        for seed in track(range(runs), f"next window, {replicas} replicas"):
            trace = make_loads(Workload(**{**load.__dict__, "seed": seed}))
            for window in range(HISTORY, load.windows):
                past, after = trace.windows(window - HISTORY, window), trace.load_WLE[window : window + 1]
                pair = [place(past, 8, replicas=replicas, solver=one).fullest(after)[0] for one in ("pack", "eplb")]
                ours.append(pair[0])
                eplb.append(pair[1])
                if pair[0].mean() > pair[1].mean():
                    above.append({"seed": seed, "window": window, "ours": pair[0].mean(), "eplb": pair[1].mean()})
        found[f"{replicas} replicas"] = {
            "ours": spread([float(one.mean()) for one in ours]),
            "eplb": spread([float(one.mean()) for one in eplb]),
            "mean_ours": float(np.mean(ours)),
            "mean_eplb": float(np.mean(eplb)),
            "share_of_windows_above": len(above) / len(ours),
            "share_of_layers_above": float((np.array(ours) > np.array(eplb)).mean()),
            "windows_above": above,
        }
    return found


def affinity(runs: int) -> dict[str, Any]:
    """What placing by affinity saves in the next windows if tokens stay with their expert, and if they go home."""
    found = {}
    for share in (0.0, 0.5, 0.8):
        rows: dict[str, dict[str, list[float]]] = {}
        for seed in track(range(runs), f"affinity {share}"):
            load = Workload(
                layers=4, num_experts=32, windows=8, tokens=2048, top_k=1, affinity=share, zipf=0.4, seed=seed
            )
            trace = make_trace(load)
            past, after = trace.windows(0, 4), trace.windows(4, 8)
            ways = {
                "balance": place(past, 4, solver="pack"),
                "affinity": place(past, 4, solver="pack", settings=Settings(objective="affinity")),
                "moetuner": place(past, 4, solver="moetuner", settings=Settings(seconds=2.0)),
            }
            for name, placement in ways.items():
                facts = rows.setdefault(name, {})
                for key, value in _crossing(placement, after).items():
                    facts.setdefault(key, []).append(value)
        found[f"affinity {share}"] = {
            name: {key: spread(values) for key, values in facts.items()} for name, facts in rows.items()
        }
    return found


def _crossing(placement: Placement, trace: Trace) -> dict[str, float]:
    """Shares of the rows that change device, and the dearest pair of devices (1: all pairs alike)."""
    copies, transition = placement.copy_LEG, trace.transition_MEE
    flow = flows(copies, transition)
    remote = flow * (1 - np.eye(placement.devices))
    device_LE = copies.argmax(2)
    device_TL = device_LE[np.arange(copies.shape[0]), trace.expert_TLK[:, :, 0]]
    home_T = np.arange(len(device_TL)) % placement.devices
    return {
        "stays_off_device": remote_share(copies, transition, 1)[0],
        "stays_dearest_pair": float((remote.max((1, 2)) / flow.sum((1, 2))).mean() * placement.devices**2),
        "home_off_device": float((device_TL != home_T[:, None]).mean()),
        "fullest": float(placement.fullest(trace.load_WLE).mean()),
    }


if __name__ == "__main__":
    main()
