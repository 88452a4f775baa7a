"""Time of a plan for every planner: ``python benchmarks/planners.py [--rounds 31]`` writes ``results/planners.json``.

The loads are multinomial draws from skewed expert shares (Dirichlet 0.3), 32,768 rows per rank; a planner runs in every
layer of every step, so what counts is its time on one thread.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import interleaved

from equipoise.parallel import LeastLoaded, Native, Planner, Replicas, Shadow, ShardedSparse, contiguous_owners
from equipoise.training.environment import environment

SIZES = ((8, 128), (64, 256), (128, 384), (320, 320))  # ranks, experts
ROWS_PER_RANK = 32_768


def planners(num_ranks: int, num_experts: int) -> dict[str, Planner]:
    slots = num_experts + -num_experts % num_ranks + num_ranks  # one more per rank than the experts need
    return {
        "Native": Native(),
        "LeastLoaded": LeastLoaded(),
        "LeastLoaded, two link levels": LeastLoaded(min_rows=(1_750, 14_000), ranks_per_node=8),
        "ShardedSparse": ShardedSparse(overlap=8, slots=2),
        "Replicas": Replicas(num_slots=slots),
        "Shadow": Shadow(dim=2048, hidden_dim=4096),
    }


def measure(num_ranks: int, num_experts: int, rounds: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    share_E = random.dirichlet(np.full(num_experts, 0.3))
    load_RE = random.multinomial(ROWS_PER_RANK, share_E, size=num_ranks)
    owner_E = contiguous_owners(num_experts, num_ranks)
    made = {name: planner.plan(load_RE, owner_E) for name, planner in planners(num_ranks, num_experts).items()}
    for plan in made.values():
        plan.check(load_RE)
    candidates = {
        name: lambda planner=planner: planner.plan(load_RE, owner_E)
        for name, planner in planners(num_ranks, num_experts).items()
    }
    seconds = interleaved(candidates, rounds)
    return {name: _figures(made[name], seconds[name]) for name in made}


def _figures(plan: Any, seconds: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(seconds, n=4)
    return {
        "median_ms": round(1e3 * median, 3),
        "quartile_1_ms": round(1e3 * low, 3),
        "quartile_3_ms": round(1e3 * high, 3),
        "imbalance": round(plan.imbalance(), 4),
        "transfers": len(plan.transfers),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/planners.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {f"{ranks} x {experts}": measure(ranks, experts, options.rounds) for ranks, experts in SIZES}
    found = {
        "benchmark": "planners",
        "environment": environment(torch.device("cpu"), 1),
        "rounds": options.rounds,
        "rows_per_rank": ROWS_PER_RANK,
        "result": result,
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for size, rows in result.items():
        for name, row in rows.items():
            print(size, name, {key: value for key, value in row.items() if key != "seconds"})


if __name__ == "__main__":
    main()
