"""Scaling laws against arXiv 2603.22339: ``python benchmarks/scaling.py all|NAME... [--workers 2]``.

Writes ``benchmarks/results/scaling.json``, one entry per part, and ``docs/evidence/scaling_laws.md`` from it. Parts
that are not named keep what the file has; ``page`` runs none.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import scaling_cases as cases
import torch

from equipoise.training.environment import environment

ROOT = Path(__file__).parents[1]
PARTS = {
    "approach2": lambda workers: cases.approach2_tables(),
    "recovery": lambda workers: cases.recovery(),
    "conditioning": lambda workers: cases.conditioning(),
    "variance": lambda workers: cases.variance(),
    "noisy": cases.noisy,
    "coverage": cases.coverage,
    "speed": lambda workers: cases.speed(),
    "power": lambda workers: cases.power(),
    "levers": lambda workers: cases.levers(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all", "page"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/scaling.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/evidence/scaling_laws.md")
    options = parser.parse_args()
    found = json.loads(options.results.read_text()) if options.results.exists() else {}
    chosen = list(PARTS) if "all" in options.parts else [part for part in options.parts if part != "page"]
    for part in chosen:
        found[part] = {"environment": environment(torch.device("cpu")), "result": PARTS[part](options.workers)}
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page({part: entry["result"] for part, entry in found.items()}), encoding="utf-8")
    print(options.page.read_text(encoding="utf-8"))


def page(found: dict[str, Any]) -> str:
    """The evidence as Markdown; parts that were not run are left out."""
    head = (
        "# Scaling laws: evidence\n\nMade by `python benchmarks/scaling.py all` from "
        "[`benchmarks/results/scaling.json`](../../benchmarks/results/scaling.json). Published figures are those of "
        "arXiv 2603.22339.\n"
    )
    return "\n".join([head, *(SECTIONS[part](found[part]) for part in SECTIONS if part in found)])


def _approach2(tables: dict[str, Any]) -> str:
    rows = []
    for layout, surfaces in tables.items():
        for surface, cells in surfaces.items():
            published = ", ".join(f"{cell['published']:+.2f}" for cell in cells)
            closed, run = (", ".join(f"{cell[key]:+.2f}" for cell in cells) for key in ("closed_form", "run"))
            rows.append([layout, surface, published, closed, run, "yes" if all(c["same"] for c in cells) else "no"])
    return _table(
        "What approach 2 gets wrong without noise",
        "Error in per cent of the compute-optimal tokens at 1e24 FLOPs: five budgets from 1e17 to 1e21, 15 sizes each, "
        "grids of +-2x, 4x, 8x and 16x. Closed form: `approach2_bias`. Run: `fit_approach2` on the losses.",
        ["grid", "surface", "published", "closed form", "run", "equal"],
        rows,
    )


def _recovery(found: dict[str, Any]) -> str:
    rows = [[solver, *(f"{error:.0e}" for error in worst.values())] for solver, worst in found.items()]
    words = (
        "Largest relative error of each parameter over 3 surfaces and 20 widths from 2x to 100x (published: below 1e-8 "
        "for the same solvers)."
    )
    return _table("Recovery without noise", words, ["solver", *next(iter(found.values()))], rows)


def _conditioning(found: dict[str, float]) -> str:
    rows = [[name, f"{value:.2g}"] for name, value in found.items()]
    words = "Condition number of the Hessian at the truth, asymmetric surface, +-8x (published: 3.5e11 and about 11)."
    return _table("Why the exponents are searched alone", words, ["search over", "condition number"], rows)


def _noisy(found: dict[str, Any]) -> str:
    rows = [
        [
            name,
            *(f"{cell[key]:.1f}" for key in ("published_max", "max")),
            f"{cell['geometric_mean']:.2f}",
            *(f"{cell[key]:,}" for key in ("fits", "failed")),
        ]
        for name, cell in found.items()
    ]
    words = (
        "Error of the exponent a in per cent: asymmetric surface, drift to 3x, +-8x, noise 0.05 to 0.2, 2 to 4 "
        "budgets, 4 to 32 sizes, 256 seeds, the published streams of noise."
    )
    head = ["method", "published maximum", "maximum", "geometric mean", "fits", "no answer"]
    return _table("Exponents from noisy runs", words, head, rows)


def _variance(found: dict[str, float]) -> str:
    rows = [[name, f"{value:.2g}"] for name, value in found.items()]
    words = "Of a on the symmetric surface, where approach 2 is unbiased, over 81 layouts (published ratio: about 8)."
    return _table("Variance", words, ["method", "variance"], rows)


def _coverage(found: list[dict[str, Any]]) -> str:
    names = list(found[0]["covered"])
    rows = [
        [row["surface"], f"{row['budgets']} x {row['points']}", f"{row['noise']}", f"{row['studies']}"]
        + [f"{100 * row['covered'][name]:.1f}" for name in names]
        for row in found
    ]
    words = (
        f"How often in 100 studies the 95 % interval ({found[0]['bootstraps']} bootstraps) holds the truth; the "
        "last three columns are the optimum at 1e23 FLOPs, 100 times the largest budget. The standard error is about 1."
    )
    head = ["surface", "budgets x sizes", "noise", "studies", *names]
    return _table("Coverage of the intervals", words, head, rows)


def _speed(found: dict[str, float]) -> str:
    rows = [[solver, f"{seconds:.1f}"] for solver, seconds in found.items()]
    words = (
        "Seconds for 217 runs with 1,000 bootstraps, one process, on a machine that may be busy (asked for: below 60)."
    )
    return _table("Speed", words, ["solver", "seconds"], rows)


def _power(found: list[dict[str, float]]) -> str:
    rows = [
        [
            *(f"{row[key]}" for key in ("budgets", "points", "noise", "runs")),
            f"{row['a']:.3f}",
            f"{row['params_factor']:.2f}",
            f"{row['detectable_loss']:.4f}",
        ]
        for row in found
    ]
    words = (
        "Chinchilla surface, budgets from 1e17 to 1e19, +-4x, asked about 1e21 FLOPs, 500 simulated studies. Factor: "
        "95 % of the studies find a best size within it. Detectable: the difference in loss between two methods at "
        "1e21 FLOPs that two such studies show with 80 % power."
    )
    head = ["budgets", "sizes", "noise", "runs", "sd of a", "factor of N*", "detectable, nats"]
    return _table("What a grid teaches", words, head, rows)


def _levers(found: list[dict[str, float]]) -> str:
    rows = [
        [
            *(f"{row[key]:g}" for key in ("top", "points", "width", "runs")),
            f"{row['a']:.4f}",
            f"{row['params_factor']:.2f}",
            f"{row['detectable_loss']:.3f}",
        ]
        for row in found
    ]
    words = "As above, three budgets from 1e17 FLOPs to the top one, noise 0.01, asked about 1e22 FLOPs."
    head = ["top budget", "sizes", "+-", "runs", "sd of a", "factor of N*", "detectable, nats"]
    return _table("What to change in a grid", words, head, rows)


def _table(title: str, words: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return f"## {title}\n\n{words}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


SECTIONS = {
    "approach2": _approach2,
    "recovery": _recovery,
    "noisy": _noisy,
    "coverage": _coverage,
    "power": _power,
    "levers": _levers,
    "conditioning": _conditioning,
    "variance": _variance,
    "speed": _speed,
}

if __name__ == "__main__":
    main()
