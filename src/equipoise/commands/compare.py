"""``equipoise compare``."""

from pathlib import Path

from rich.console import Console

from equipoise.commands import print_json
from equipoise.config import CompareConfig

Config = CompareConfig
EXAMPLE = "equipoise compare --methods switch loss_free --minutes 4 --data my_texts/"


def _fit(config: CompareConfig, as_json: bool) -> None:
    """Train a grid of sizes and budgets, and hand it to ``equipoise scaling-law``."""
    from equipoise.commands import scaling_law
    from equipoise.training.isoflop import isoflop

    file = isoflop(config)
    scaling_law.run(scaling_law.Config(runs=str(file), out=str(Path(config.out) / "law")), as_json)


def run(config: CompareConfig, as_json: bool) -> None:
    """Compare and print the table."""
    from equipoise.report.table import table
    from equipoise.training.compare import REPORT_FILE, compare

    if config.isoflop is not None:
        _fit(config, as_json)
        return
    results = compare(config)
    if as_json:
        print_json(results)
        return
    Console().print(table(results))
    flops, rule = results["budget"]["flops"], config.optimizer
    counts = sorted({run["steps"] for run in results["runs"]})
    steps = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    print(
        f"Each run: {flops:.3g} FLOPs, {steps} steps; the learning rate rises to {rule.learning_rate:g} in the first "
        f"{rule.warmup:.0%} and falls to {rule.min_learning_rate:g}.\nReport: {Path(config.out) / REPORT_FILE}"
    )
