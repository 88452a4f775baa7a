"""Approach 2, a parabola per budget, and what its shape alone makes it miss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from equipoise.errors import require
from equipoise.scaling.identify import budgets_of
from equipoise.scaling.runs import Runs
from equipoise.scaling.surface import Surface

FEWEST_SIZES = 3
WIDEST_BUDGET = 1.2  # runs that differ more in FLOPs do not lie on one parabola


@dataclass(frozen=True)
class PowerLaws:
    """Compute-optimal sizes as power laws: ``ln N* = a ln C + ...``, ``ln D* = b ln C + ...``.

    Attributes:
        budgets: FLOPs of each parabola.
        best_params: parameters at each parabola's vertex.
        best_tokens: tokens that go with them.
    """

    budgets: Float[np.ndarray, " C"]
    best_params: Float[np.ndarray, " C"]
    best_tokens: Float[np.ndarray, " C"]

    @property
    def a(self) -> float:
        """Growth of compute-optimal parameters with compute."""
        return float(self._line(self.best_params)[0])

    @property
    def b(self) -> float:
        """Growth of compute-optimal tokens with compute."""
        return float(self._line(self.best_tokens)[0])

    def params(self, flops: float) -> float:
        """Compute-optimal parameters."""
        return float(np.exp(np.polyval(self._line(self.best_params), np.log(flops))))

    def tokens(self, flops: float) -> float:
        """Compute-optimal tokens."""
        return float(np.exp(np.polyval(self._line(self.best_tokens), np.log(flops))))

    def _line(self, sizes: Float[np.ndarray, " C"]) -> np.ndarray:
        return np.polyfit(np.log(self.budgets), np.log(sizes), 1)


def fit_approach2(runs: Runs) -> PowerLaws:
    """Fit a parabola of loss over ln N to each budget, then a line through the logarithms of their vertices.

    Fails: UserError for fewer than two budgets, fewer than 3 sizes in one, budgets that blur into each other, and a
    parabola without a lowest point.
    Source: Hoffmann et al. 2022 (arXiv 2203.15556), approach 2. Differs: D* is C / (c N*) instead of a second parabola,
    which is the same where C = c N D is exact.
    """
    groups = budgets_of(runs.flops)
    require(len(groups) > 1, "Approach 2 needs runs at two budgets or more.")
    best = []
    for budget, members in groups.items():
        span = float(runs.flops[members].max() / runs.flops[members].min())
        require(span <= WIDEST_BUDGET, f"Approach 2 needs budgets; the runs near {budget:.2g} FLOPs have many.")
        logs = np.log(runs.params[members])
        _refuse_few(logs, budget)
        bend, slope, _ = np.polyfit(logs - logs.mean(), runs.loss[members], 2)
        require(bool(bend > 0), f"The losses at {budget:.2g} FLOPs have no lowest point, so approach 2 has no answer.")
        best.append(logs.mean() - slope / (2 * bend))
    budgets, params = np.array(list(groups)), np.exp(best)
    return PowerLaws(budgets, params, budgets / (runs.flops_per_product * params))


def _refuse_few(logs: Float[np.ndarray, " S"], budget: float) -> None:
    sizes = len(np.unique(logs))
    require(sizes >= FEWEST_SIZES, f"Approach 2 needs {FEWEST_SIZES} sizes at {budget:.2g} FLOPs; there are {sizes}.")


@dataclass(frozen=True)
class Bias:
    """What approach 2 gets wrong on a grid without any noise.

    Attributes:
        budgets: FLOPs.
        shifts: ln of the size it finds at each budget over the true one.
    """

    budgets: Float[np.ndarray, " C"]
    shifts: Float[np.ndarray, " C"]

    @property
    def exponent(self) -> float:
        """What it adds to ``a``; it takes as much from ``b``."""
        return float(self._line[0])

    def params_error(self, flops: float) -> float:
        """Relative error of compute-optimal parameters at a budget, extrapolated as approach 2 does."""
        return float(np.expm1(np.polyval(self._line, np.log(flops))))

    def tokens_error(self, flops: float) -> float:
        """Relative error of compute-optimal tokens at a budget, extrapolated as approach 2 does."""
        return float(np.expm1(-np.polyval(self._line, np.log(flops))))

    @property
    def _line(self) -> np.ndarray:
        return np.polyfit(np.log(self.budgets), self.shifts, 1)


def approach2_bias(surface: Surface, runs: Runs) -> Bias:
    """The bias of approach 2 on the user's own grid, if the surface is the truth.

    Along a budget the loss is, up to a factor and a constant, ``exp(-alpha x) / alpha + exp(beta x) / beta`` with
    ``x = ln(N / N*)``: the bias depends on where the sizes lie around the optimum and on nothing else.

    Fails: UserError as ``fit_approach2``.
    Source: arXiv 2603.22339, appendix (derivation of the vertex shift). Differs: sizes may lie anywhere.
    """
    factor = runs.flops_per_product
    groups = budgets_of(runs.flops)
    require(len(groups) > 1, "Approach 2 needs runs at two budgets or more.")
    shifts = []
    for budget, members in groups.items():
        best = surface.best_params(budget, factor)
        offsets = np.log(runs.params[members] / best)
        _refuse_few(offsets, budget)
        shifts.append(vertex_shift(float(surface.alpha), float(surface.beta), offsets))
    return Bias(np.array(list(groups)), np.array(shifts))


def vertex_shift(alpha: float, beta: float, offsets: Float[np.ndarray, " S"]) -> float:
    """ln of the size that a parabola through these offsets ``ln(N / N*)`` finds, over the true one."""
    loss = np.exp(-alpha * offsets) / alpha + np.exp(beta * offsets) / beta
    middle = offsets.mean()
    bend, slope, _ = np.polyfit(offsets - middle, loss, 2)
    return float(middle - slope / (2 * bend))


def leading_shift(alpha: float, beta: float, half_width: float, points: int) -> float:
    """``vertex_shift`` to leading order, for equally spaced offsets from -half_width to half_width.

    ``(alpha - beta)/6 h^2 (3 n^2 - 7) / (5 (n - 1)^2)``; ours (INFERRED), it agrees with ``vertex_shift`` to the next
    order in h.
    """
    return (alpha - beta) / 6 * half_width**2 * (3 * points**2 - 7) / (5 * (points - 1) ** 2)
