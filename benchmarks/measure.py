"""Honest timing: the candidates take turns in one process, and what is reported are ratios with their spread."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of every candidate in every round; each round runs all of them once, so that all meet the same noise."""
    for _ in range(warmup):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Pair by pair: the median of the ratios, and their quartiles."""
    ratios = [a / b for a, b in zip(over, under)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"median": round(median, 4), "quartile_1": round(low, 4), "quartile_3": round(high, 4), "pairs": len(ratios)}
