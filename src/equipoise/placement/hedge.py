"""A plan for the next window: the windows seen are samples, and the worst of them is not all that counts."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from equipoise.placement.problem import Problem

POWER = 8  # high enough that full devices count most, low enough that all windows count
SLACK = 0.01  # of the worst window, to be given up for the others
LEAST_GAIN = 1e-9


def hedge(problem: Problem, copy_EG: Bool[np.ndarray, "E G"]) -> Bool[np.ndarray, "E G"]:
    """Swap experts so that the sum of all loads to the eighth power falls, over windows and devices.

    Where one heavy expert decides the worst window, the smallest maximum leaves open what is good for the others, or
    trades it for next to nothing. The value rises by at most a hundredth.

    Source: ours; measured on loads that were not planned with (docs/guides/placement.md).
    """
    copy_EG = copy_EG.copy()
    limit = problem.value(copy_EG) * (1 + SLACK)
    weight_WE = problem.share_WE / copy_EG.sum(1)
    load_WG = weight_WE @ copy_EG
    while True:
        hot = int((load_WG**POWER).sum(0).argmax())
        mine = np.flatnonzero(copy_EG[:, hot])
        theirs, device = np.nonzero(copy_EG & ~copy_EG[:, hot, None])
        if not len(theirs):
            return copy_EG
        delta = weight_WE[:, mine, None] - weight_WE[:, None, theirs]
        saved = _saved(load_WG[:, hot, None, None], load_WG[:, device][:, None], delta, limit)
        saved[copy_EG[mine][:, device]] = -np.inf
        a, b = np.unravel_index(saved.argmax(), saved.shape)
        if saved[a, b] <= LEAST_GAIN * (load_WG**POWER).sum():  # less than this is rounding
            return copy_EG
        copy_EG[[mine[a], theirs[b]], hot] = [False, True]
        copy_EG[[mine[a], theirs[b]], device[b]] = [True, False]
        load_WG[:, hot] -= delta[:, a, b]
        load_WG[:, device[b]] += delta[:, a, b]


def _saved(
    hot: Float[np.ndarray, "W 1 1"], other: Float[np.ndarray, "W 1 n"], delta: Float[np.ndarray, "W m n"], limit: float
) -> Float[np.ndarray, "m n"]:
    """By how much each swap lowers the sum; minus infinity where a device would get above the limit."""
    cooler, fuller = hot - delta, other + delta
    saved = (hot**POWER + other**POWER - cooler**POWER - fuller**POWER).sum(0)
    return np.where(np.maximum(cooler, fuller).max(0) <= limit, saved, -np.inf)
