"""A comparison's results, condensed: one row per method, what its seeds can show, and one sentence."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from equipoise.report.seeds import detectable_difference, is_clear, paired_difference

Results = dict[str, Any]  # the content of results.json
Run = dict[str, Any]  # one entry of its "runs"


@dataclass(frozen=True)
class Row:
    """One method, averaged over its seeds.

    Attributes:
        method: its name.
        seeds: how many runs the means are over.
        causal: False where training gave tokens experts that depend on later tokens.
        perplexity: on the validation set.
        perplexity_sd: sample standard deviation over the seeds; None with one seed or without finite values.
        difference: mean paired difference of the perplexity to the baseline; None without two finite pairs.
        difference_se: its standard error.
        difference_is_clear: its 95 % interval excludes zero.
        max_vio_global: (max load - mean) / mean over the validation set, averaged over layers.
        max_vio_batch: the same in one batch.
        dead_experts: experts that got no token, all layers together.
        experts: routed experts, all layers together.
        load_entropy: 0 (all to one expert) to 1 (even).
        specialisation: mutual information of domain and expert over the entropy of the domain, 0 to 1.
        tokens_per_second: in training.
        peak_memory_bytes: in training.
    """

    method: str
    seeds: int
    causal: bool
    perplexity: float
    perplexity_sd: float | None
    difference: float | None
    difference_se: float | None
    difference_is_clear: bool | None
    max_vio_global: float
    max_vio_batch: float
    dead_experts: float
    experts: int
    load_entropy: float
    specialisation: float
    tokens_per_second: float
    peak_memory_bytes: float


def runs_by_method(results: Results) -> dict[str, list[Run]]:
    """Method to its runs, in order of first appearance."""
    runs: dict[str, list[Run]] = {}
    for run in results["runs"]:
        runs.setdefault(run["method"], []).append(run)
    return runs


def summarise(results: Results) -> list[Row]:
    """One row per method, in order of first appearance; means are over seeds."""
    runs = runs_by_method(results)
    baseline = _perplexity_by_seed(runs.get(results["baseline"], []))
    return [_row(method, runs[method], baseline if method != results["baseline"] else {}) for method in runs]


def power(results: Results) -> str:
    """One sentence: the difference in perplexity that this comparison is too small to see.

    A method with a perplexity that is not finite is left out. See `seeds.detectable_difference` for the formula.
    """
    by_method = [_perplexity_by_seed(runs) for runs in runs_by_method(results).values()]
    if max((len(values) for values in by_method), default=0) < 2:
        return (
            "One seed shows no spread: no difference in perplexity can be claimed from this comparison; "
            "run it with --seeds 3."
        )
    finite = [values for values in by_method if _finite(values)]
    if len(finite) < 2:
        return "Fewer than two methods finished with a finite perplexity: there is no difference to see."
    shared = sorted(set.intersection(*(set(values) for values in finite)))
    if len(shared) < 2:
        return "The methods share fewer than two seeds: no paired difference can be claimed from this comparison."
    smallest = detectable_difference([[values[seed] for seed in shared] for values in finite])
    return (
        f"With {len(shared)} seeds, differences in perplexity under {smallest:.2g} cannot be seen with this budget "
        "(95 % confidence, 80 % power)."
    )


def headline(results: Results) -> str:
    """The result in one sentence: who spreads the load most evenly, and who reaches the lowest perplexity."""
    rows = [row for row in summarise(results) if math.isfinite(row.perplexity) and math.isfinite(row.max_vio_global)]
    if not rows:
        return "No run finished with a finite perplexity."
    baseline = next((row for row in rows if row.method == results["baseline"]), None)
    even = min(rows, key=lambda row: row.max_vio_global)
    against = f", {baseline.method} {baseline.max_vio_global:.2f}" if baseline and baseline is not even else ""
    balance = f"{even.method} spreads the load most evenly (MaxVio {even.max_vio_global:.2f}{against})"
    return f"{balance}; {_best_perplexity(rows, baseline)}."


def perplexity_digits(rows: list[Row]) -> int:
    """Decimals to show of a perplexity: three where one is under 10, else two."""
    return 3 if min(row.perplexity for row in rows) < 10 else 2


def _best_perplexity(rows: list[Row], baseline: Row | None) -> str:
    digits = perplexity_digits(rows)
    best = min(rows, key=lambda row: row.perplexity)
    reached = f"{best.method} reaches the lowest perplexity, {best.perplexity:.{digits}f}"
    if best.seeds == 1:
        return f"{reached}, which one seed cannot tell from chance"
    if best is baseline:
        return f"no method goes below the perplexity of {best.method}, {best.perplexity:.{digits}f}"
    if baseline is None or best.difference is None or best.difference_se is None:
        return reached
    if not best.difference_is_clear:
        return f"{reached}, within chance of {baseline.method} ({baseline.perplexity:.{digits}f})"
    return f"{reached}, {-best.difference:.{digits}f} \u00b1 {best.difference_se:.{digits}f} below {baseline.method}"


def _perplexity_by_seed(runs: list[Run]) -> dict[int, float]:
    return {run["seed"]: float(run["perplexity"]) for run in runs}


def _finite(values: dict[int, float]) -> bool:
    return all(math.isfinite(value) for value in values.values())


def _row(method: str, runs: list[Run], baseline: dict[int, float]) -> Row:
    values = _perplexity_by_seed(runs)
    paired = paired_difference(values, baseline)
    pairs = len(values.keys() & baseline.keys())

    def mean(key: str) -> float:
        return statistics.fmean(run[key] for run in runs)

    return Row(
        method=method,
        seeds=len(runs),
        causal=all(run["causal"] for run in runs),
        perplexity=mean("perplexity"),
        perplexity_sd=statistics.stdev(values.values()) if len(values) > 1 and _finite(values) else None,
        difference=paired[0] if paired else None,
        difference_se=paired[1] if paired else None,
        difference_is_clear=is_clear(*paired, pairs) if paired else None,
        max_vio_global=mean("max_vio_global"),
        max_vio_batch=mean("max_vio_batch"),
        dead_experts=mean("dead_experts"),
        experts=sum(len(layer["load"]) for layer in runs[0]["per_layer"]),
        load_entropy=mean("load_entropy"),
        specialisation=mean("specialisation"),
        tokens_per_second=mean("tokens_per_second"),
        peak_memory_bytes=mean("peak_memory_bytes"),
    )
