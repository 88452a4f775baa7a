"""Fitted laws as plain values: what the command prints and saves, and the report shows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from equipoise.errors import UserError
from equipoise.scaling.allocation import Candidates, Optimum
from equipoise.scaling.approach2 import approach2_bias, fit_approach2
from equipoise.scaling.approach3 import fit_approach3
from equipoise.scaling.bootstrap import Interval
from equipoise.scaling.crossing import find_crossing
from equipoise.scaling.form import CHINCHILLA
from equipoise.scaling.law import ScalingLaw

Summary = dict[str, Any]
BEYOND = 10.0  # times the largest measured budget: how far a law is trusted unless the user asks for more


def summarise(laws: Mapping[str, ScalingLaw], flops: Sequence[float], candidates: Candidates | None) -> Summary:
    """Everything known of the laws, by method.

    Args:
        laws: by method; "" for runs without one.
        flops: budgets to recommend for.
        candidates: for laws with extra terms; without them such laws recommend nothing.
    """
    return {
        "laws": {method: _law(law, flops, candidates) for method, law in laws.items()},
        "crossings": [_crossing(laws, pair, max(flops)) for pair in itertools.combinations(laws, 2)],
    }


def default_budget(laws: Mapping[str, ScalingLaw]) -> float:
    """Ten times the largest budget that was run."""
    return BEYOND * max(float(law.runs.flops.max()) for law in laws.values())


def _law(law: ScalingLaw, flops: Sequence[float], candidates: Candidates | None) -> Summary:
    intervals = law.intervals
    dense = law.form == CHINCHILLA
    values = {**law.parameters, "a": law.a} if dense else law.parameters
    known: Summary = {
        "runs": len(law.runs.loss),
        "flops_per_product": law.runs.flops_per_product,
        "parameters": {name: _ranged(value, intervals[name]) for name, value in values.items()},
        "residual_sd": float(np.std(law.runs.loss - law.predict(law.runs.features()))),
        "warnings": list(law.warnings),
    }
    if dense or candidates is not None:
        known["optima"] = [_optimum(law.optimum(budget, None if dense else candidates)) for budget in flops]
    if dense:
        known["comparison"] = _comparison(law, max(flops))
    return known


def _optimum(optimum: Optimum) -> Summary:
    sizes = {name: _ranged(getattr(optimum, name), interval) for name, interval in optimum.intervals.items()}
    known: Summary = {"flops": optimum.flops, **sizes}
    if optimum.total is not None:
        known |= {name: getattr(optimum, name) for name in ("total", "experts", "granularity")}
        known["at_edge"] = list(optimum.at_edge)
    return known


def _comparison(law: ScalingLaw, flops: float) -> Summary:
    """What the two classic approaches say of the same runs, at the largest budget."""
    third = fit_approach3(law.runs)
    factor = law.runs.flops_per_product
    known: Summary = {
        "flops": flops,
        "approach3": {
            "a": float(third.params_exponent),
            "params": _finite(float(third.best_params(flops, factor))),
            "tokens": _finite(float(third.best_tokens(flops, factor))),
        },
    }
    try:
        second, bias = fit_approach2(law.runs), approach2_bias(law.surface, law.runs)
    except UserError as refusal:  # the grid is not laid out for it; the law itself does not need that
        return known | {"approach2_refused": str(refusal)}
    return known | {
        "approach2": {"a": second.a, "params": second.params(flops), "tokens": second.tokens(flops)},
        "approach2_bias": {
            "a": bias.exponent,
            "params": _finite(bias.params_error(flops)),
            "tokens": _finite(bias.tokens_error(flops)),
        },
    }


def _crossing(laws: Mapping[str, ScalingLaw], pair: tuple[str, str], high: float) -> Summary:
    first, second = (laws[name] for name in pair)
    low = float(min(first.runs.flops.min(), second.runs.flops.min()))
    try:
        found = find_crossing(first, second, low, max(high, 2 * low))
    except UserError as refusal:
        return {"methods": list(pair), "verdict": "refused", "sentence": str(refusal)}
    return {
        "methods": list(pair),
        "verdict": found.verdict,
        "probability": found.probability,
        "flops": None if found.flops is None or found.interval is None else _ranged(found.flops, found.interval),
        "low": found.low,
        "high": found.high,
        "sentence": found.sentence(*pair),
    }


def _ranged(value: float, interval: Interval) -> dict[str, float | None]:
    return {"value": _finite(value), "low": _finite(interval.low), "high": _finite(interval.high)}


def _finite(value: float) -> float | None:
    """JSON has no infinity: None stands for what is not known."""
    return value if math.isfinite(value) else None
