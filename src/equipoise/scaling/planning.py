"""Which runs to make: a grid of budgets and sizes around a guess, and what it would teach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from equipoise.errors import require
from equipoise.scaling.runs import FLOPS_PER_PRODUCT, Runs
from equipoise.scaling.surface import Surface

FEWEST_POINTS = 5
TOKENS_PER_PARAM = 20.0  # Hoffmann et al. 2022: about what they found best at their budgets


@dataclass(frozen=True)
class PlannedRun:
    """One run of a grid.

    Attributes:
        budget: FLOPs it may spend.
        size: its position among the candidates.
        params: their parameters.
        tokens: what the budget pays for at this size.
    """

    budget: float
    size: int
    params: float
    tokens: float


def plan_isoflop(
    budgets: Sequence[float] | Float[np.ndarray, " C"],
    sizes: Sequence[float] | Float[np.ndarray, " S"],
    flops_per_token: Callable[[int], float],
    *,
    points: int = 7,
    width: float = 4.0,
    guess: Callable[[float], float] | None = None,
) -> tuple[PlannedRun, ...]:
    """Choose, per budget, sizes that lie evenly (in the logarithm) around a guess of the best one.

    Args:
        budgets: FLOPs, two or more.
        sizes: parameters of the models that can be built (active ones, for a Mixture-of-Experts), in any order.
        flops_per_token: position among ``sizes`` to training FLOPs per token.
        points: runs per budget, at least 5.
        width: sizes reach from guess / width to guess * width.
        guess: budget to the parameters believed best; 20 tokens per parameter if not given.

    Returns: the runs, by budget, then size.
    Fails: UserError for values that make no sense, and for a budget around which there are too few sizes; it says
    between which bounds more are needed.
    """
    params = np.asarray(sizes, dtype=np.float64)
    wanted = sorted({float(budget) for budget in budgets})
    require(len(wanted) > 1, "A grid needs two budgets or more: from one, alpha and beta cannot be told apart.")
    require(wanted[0] > 0, f"Budgets must be above 0 FLOPs, not {wanted[0]:g}.")
    require(points >= FEWEST_POINTS, f"A budget needs at least {FEWEST_POINTS} points, not {points}.")
    require(width > 1, f"width must be above 1, not {width}.")
    require(len(params) > 0 and bool((params > 0).all()), "Sizes must be parameter counts above 0.")
    plan = []
    for budget in wanted:
        centre = (guess or _rule_of_thumb)(budget)
        for size in _around(params, centre, width, points, budget):
            plan.append(PlannedRun(budget, size, float(params[size]), budget / flops_per_token(size)))
    return tuple(plan)


def _rule_of_thumb(budget: float) -> float:
    return float(np.sqrt(budget / (FLOPS_PER_PRODUCT * TOKENS_PER_PARAM)))


def _around(params: Float[np.ndarray, " S"], centre: float, width: float, points: int, budget: float) -> list[int]:
    """Positions of the sizes nearest to evenly spaced targets, each taken once, by size."""
    low, high = centre / width, centre * width
    slack = width ** (1 / (points - 1))  # half a step beyond either end
    free = [int(place) for place in np.argsort(params) if low / slack <= params[place] <= high * slack]
    require(
        len(free) >= points,
        f"Around {budget:.2g} FLOPs there are {len(free)} candidate sizes from {low:.2g} to {high:.2g} parameters and "
        f"{points} are needed; offer more sizes there, or change width, points or the budget.",
    )
    chosen = []
    for target in np.geomspace(low, high, points):
        nearest = min(free, key=lambda place: abs(np.log(params[place] / target)))
        free.remove(nearest)
        chosen.append(nearest)
    return sorted(chosen, key=lambda place: params[place])


def grid_of(
    surface: Surface,
    budgets: Sequence[float] | Float[np.ndarray, " C"],
    *,
    points: int,
    width: float,
    offsets: Sequence[float] | Float[np.ndarray, " C"] | None = None,
) -> Runs:
    """What a surface says of a grid: the losses of runs without noise, for trying out a layout.

    Args:
        surface: the truth.
        budgets: FLOPs.
        points: sizes per budget, evenly spaced in the logarithm.
        width: sizes reach from the centre / width to the centre * width.
        offsets: per budget, ln of the centre over the best size; 0, centred, if not given.
    """
    flops = np.repeat(np.asarray(budgets, dtype=np.float64), points)
    shift = np.zeros(len(budgets)) if offsets is None else np.asarray(offsets, dtype=np.float64)
    steps = np.linspace(-np.log(width), np.log(width), points)
    params = surface.best_params(flops) * np.exp((shift[:, None] + steps).ravel())
    tokens = flops / (FLOPS_PER_PRODUCT * params)
    return Runs(params, tokens, np.asarray(surface.loss(params, tokens)), flops)
