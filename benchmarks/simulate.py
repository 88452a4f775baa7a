"""The simulator held against published figures, and all policies at 8 to 4,096 ranks.

``python benchmarks/simulate.py`` writes ``results/simulate.json``, and ``docs/evidence/simulate.md`` from it.
``--fit`` only prints the constants that fit LLEP's row for gpt-oss-120b: they stand in ``simulate_settings.json`` and
in ``equipoise.simulator.Software``, so that a comparison fits nothing. ``--tables`` makes the page again from the JSON.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import simulate_cases
import simulate_tables
from rich.progress import track

from equipoise.simulator import Settings, simulate
from equipoise.simulator.results import facts
from equipoise.training.environment import environment

ROOT = Path(__file__).parents[1]
SETTINGS = ROOT / "benchmarks/simulate_settings.json"
SIZES = (8, 64, 512, 4096)
WORKLOADS = ("zipf:0.8", "zipf:1.2")
MODEL = "deepseek-v3"
KEPT = ("seconds", "speedup", "phases", "imbalance", "waiting", "peak_gb", "fits", "transfers", "gb_per_rank")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="only print the constants that fit")
    parser.add_argument("--tables", action="store_true", help="only make the page again")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/simulate.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/evidence/simulate.md")
    options = parser.parse_args()
    text = SETTINGS.read_bytes()
    given = json.loads(text)
    if options.fit:
        fitted = simulate_cases.fit(given["llep"])
        print(fitted.constants, [round(error, 3) for error in fitted.errors])
        return
    if not options.tables:
        found = {
            "benchmark": "simulate",
            "label": "simulated",
            "environment": environment(threads=1),
            "settings_sha256": hashlib.sha256(text).hexdigest(),
            "llep": simulate_cases.llep(given["llep"]),
            "diagnosis": simulate_cases.diagnosis(given["llep"]),
            "hecate": simulate_cases.hecate(given["hecate"]),
            "moetuner": simulate_cases.moetuner(given["moetuner"]),
            "bytescale": simulate_cases.bytescale(given["bytescale"]),
            "policies": [policies(*point) for point in track([(w, n) for w in WORKLOADS for n in SIZES], "Policies")],
            "largest": largest(),
        }
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    options.page.write_text(simulate_tables.page(json.loads(options.out.read_text()), given), encoding="utf-8")


def policies(workload: str, ranks: int) -> dict[str, Any]:
    """All policies on so many ranks."""
    start = time.process_time()
    found = facts(simulate(workload, f"h200x8:{ranks}", settings=Settings(shape=MODEL)))
    return {
        "workload": workload,
        "ranks": ranks,
        "ep": found["settings"]["ep"],
        "cpu_seconds": round(time.process_time() - start, 2),
        "policies": {name: {key: policy[key] for key in KEPT} for name, policy in found["policies"].items()},
    }


def largest() -> dict[str, Any]:
    """The largest simulation that is promised: a group of 384 ranks, ten times, 60 layers, all policies."""
    start, cpu = time.perf_counter(), time.process_time()
    simulation = simulate("zipf:1.2", "h200x8:3840", settings=Settings(shape="kimi-k2", ep=384))
    return {
        "ranks": simulation.cluster.num_ranks,
        "ep": simulation.settings.ep,
        "layers": simulation.shape.num_layers,
        "policies": len(simulation.outcomes),
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - start,
    }


if __name__ == "__main__":
    main()
