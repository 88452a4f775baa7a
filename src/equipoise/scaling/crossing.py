"""Does one method overtake another as compute grows? Where, and how sure is that?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from equipoise.errors import require
from equipoise.scaling.bootstrap import Interval, interval_of
from equipoise.scaling.form import CHINCHILLA
from equipoise.scaling.law import ScalingLaw
from equipoise.scaling.surface import Surface

BUDGETS = 400  # along the range, evenly in the logarithm; the crossing is interpolated between two of them


@dataclass(frozen=True)
class Crossing:
    """Which of two methods reaches the lower loss, each at its own best size, from ``low`` to ``high`` FLOPs.

    Attributes:
        verdict: ``crossing``: one is better at the low end, the other at the high end. ``none``: one is better at both.
            ``undecided``: no case has the confidence asked for.
        probability: share of the refits that agree with the likeliest case.
        better_at_low: position, 0 or 1, of the method that is better there in the likeliest case.
        better_at_high: the same at the high end.
        flops: where the likeliest crossing lies, the median of the refits that have it; None without one.
        interval: of ``flops``, over the refits that have this crossing.
        low: where the range starts.
        high: where it ends.
    """

    verdict: Literal["crossing", "none", "undecided"]
    probability: float
    better_at_low: int
    better_at_high: int
    flops: float | None
    interval: Interval | None
    low: float
    high: float

    def sentence(self, first: str, second: str) -> str:
        """The answer in words."""
        names = first, second
        span = f"from {self.low:.2g} to {self.high:.2g} FLOPs"
        sure = f"{self.probability:.1%} of the refits"
        if self.verdict == "undecided":
            return f"Undecided {span} between {first} and {second}: the likeliest case has only {sure}."
        if self.flops is None or self.interval is None:
            return f"No crossing {span}: {names[self.better_at_low]} stays ahead of {_other(names, self)} ({sure})."
        return (
            f"{names[self.better_at_high]} overtakes {names[self.better_at_low]} at {self.flops:.2g} FLOPs "
            f"({self.interval.low:.2g} to {self.interval.high:.2g}; {sure})."
        )


def find_crossing(first: ScalingLaw, second: ScalingLaw, low: float, high: float, seed: int = 0) -> Crossing:
    """Compare two methods' lowest losses over a range of budgets.

    The two laws' refits are paired at random, as their runs are independent. A pair of crossings within the range,
    there and back, counts as none.

    Args:
        first: a law without extra terms, with intervals; its confidence is the one that is asked for.
        second: likewise.
        low: FLOPs at which the range starts.
        high: FLOPs at which it ends.
        seed: of the pairing.

    Fails: UserError for a range that is empty, a law with extra terms, and a law without intervals.
    """
    require(0 < low < high < np.inf, f"A range of FLOPs must rise from above 0, not from {low:g} to {high:g}.")
    for law in (first, second):
        require(law.form == CHINCHILLA, "Crossings are between laws without extra terms.")
        require(len(law.draws) > 0, "A crossing needs laws with intervals: more runs, and bootstraps above 0.")
    budgets = np.geomspace(low, high, BUDGETS)
    number = min(len(first.draws), len(second.draws))
    mixed = np.random.default_rng(seed).permutation(len(second.draws))[:number]
    drawn = _gap(first, second, _taken(first, np.arange(number)), _taken(second, mixed), budgets)
    ends = np.stack([drawn[:, 0] > 0, drawn[:, -1] > 0])  # True where the second is better
    likeliest, probability = _likeliest(ends)
    crosses = bool(likeliest[0] != likeliest[1])
    agree = (ends == likeliest[:, None]).all(0)
    places = _places(drawn[agree], budgets) if crosses else np.empty(0)
    sure = probability >= first.confidence
    return Crossing(
        verdict="undecided" if not sure else "crossing" if crosses else "none",
        probability=probability,
        better_at_low=int(likeliest[0]),
        better_at_high=int(likeliest[1]),
        flops=float(np.median(places)) if crosses else None,
        interval=interval_of(places, first.confidence) if crosses else None,
        low=low,
        high=high,
    )


def _other(names: tuple[str, str], found: Crossing) -> str:
    return names[1 - found.better_at_low]


def _taken(law: ScalingLaw, places: np.ndarray) -> Surface:
    return Surface(*(np.asarray(values)[places, None] for values in law.drawn_surfaces))


def _gap(
    first: ScalingLaw, second: ScalingLaw, one: Surface, other: Surface, budgets: Float[np.ndarray, " C"]
) -> Float[np.ndarray, "R C"]:
    """How much lower the second method's loss is, per refit and budget."""
    mine = one.best_loss(budgets, first.runs.flops_per_product)
    return np.asarray(mine - other.best_loss(budgets, second.runs.flops_per_product))


def _likeliest(ends: Bool[np.ndarray, "2 R"]) -> tuple[Bool[np.ndarray, " 2"], float]:
    """The most frequent pair of winners at the two ends, and its share."""
    cases, counts = np.unique(ends, axis=1, return_counts=True)
    best = int(counts.argmax())
    return cases[:, best], float(counts[best] / ends.shape[1])


def _places(gap: Float[np.ndarray, "R C"], budgets: Float[np.ndarray, " C"]) -> Float[np.ndarray, " R"]:
    """FLOPs of the last change of sign of every row, which has one."""
    change = np.diff(gap > 0, axis=1)
    after = change.shape[1] - np.argmax(change[:, ::-1], axis=1)
    rows = np.arange(len(gap))
    share = gap[rows, after - 1] / (gap[rows, after - 1] - gap[rows, after])
    logs = np.log(budgets)
    return np.exp(logs[after - 1] + share * (logs[after] - logs[after - 1]))
