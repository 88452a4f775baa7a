"""Run benchmarks and write their results: ``python benchmarks/run.py step|bookkeeping|routing|all [--rounds 31]``.

Every result is a JSON file in ``benchmarks/results/`` with commit, machine, versions, raw samples and spread. Figures
are ratios of candidates that took turns in one process.
"""

import argparse
import json
from pathlib import Path

import routing_cost
import step
import torch

from equipoise.training.environment import environment

ROUTING_PAGE = Path(__file__).parents[1] / "docs/evidence/routing_cost.md"
BENCHMARKS = {"step": step.against_transformers, "bookkeeping": step.bookkeeping, "routing": routing_cost.routing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in BENCHMARKS if options.name == "all" else [options.name]:
        found = {
            "benchmark": name,
            "environment": environment(torch.device("cpu"), options.threads),
            "rounds": options.rounds,
        }
        found["result"] = BENCHMARKS[name](options.rounds)
        device = found["environment"]["device"].lower().replace(" ", "-")
        path = options.out / f"{name}-{device}-{options.threads}threads.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if name == "routing":
            ROUTING_PAGE.write_text(routing_cost.page(found), encoding="utf-8")
        print(json.dumps({name: _without_samples(found["result"])}, indent=1))


def _without_samples(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_samples(item) for key, item in value.items() if key != "seconds"}
    return value


if __name__ == "__main__":
    main()
