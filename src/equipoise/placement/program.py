"""Mixed-integer programs, written once and solved by HiGHS (through scipy) or by CP-SAT (OR-tools)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, Num
from scipy import optimize, sparse

from equipoise.errors import UserError

Engine = Literal["highs", "cp_sat"]
SCALE = 2**20  # CP-SAT knows integers only: loads are counted in this part of a mean device load


@dataclass(frozen=True)
class Answer:
    """What a solver found.

    Attributes:
        values: of all variables; None if it found none in time.
        bound: no solution is smaller, proven.
    """

    values: Float[np.ndarray, " variables"] | None
    bound: float


class Program:
    """Minimise a sum of variables under linear rows. Variables are yes-or-no, or continuous from 0 to ``limit``."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.binary: list[bool] = []
        self.goal: list[tuple[int, float]] = []
        self.rows: list[tuple[np.ndarray, np.ndarray, float, float]] = []

    def variables(self, *shape: int, binary: bool = True) -> Int[np.ndarray, ...]:
        """New variables, as an array of their numbers."""
        start = len(self.binary)
        self.binary += [binary] * int(np.prod(shape))
        return np.arange(start, len(self.binary)).reshape(shape)

    def add(self, terms: Sequence[tuple[Any, Any]], low: int | float = -np.inf, high: int | float = np.inf) -> None:
        """The row ``low <= sum <= high``; each term is (coefficient, variables), summed over what it broadcasts to."""
        broadcast = [np.broadcast_arrays(np.asarray(factor, float), variables) for factor, variables in terms]
        factors = np.concatenate([factor.ravel() for factor, _ in broadcast])
        numbers = np.concatenate([variables.ravel() for _, variables in broadcast])
        self.rows.append((factors, numbers, low, high))

    def minimise(self, variables: Any, factor: float = 1.0) -> None:
        """Add factor times these variables to what is minimised."""
        self.goal += [(int(number), factor) for number in np.ravel(variables)]

    def solve(self, engine: Engine, seconds: float, gap: float = 1e-6) -> Answer:
        """Solve, for at most so many seconds or until the relative gap is closed.

        Fails: UserError if CP-SAT is asked for and not installed.
        """
        return self._highs(seconds, gap) if engine == "highs" else self._cp_sat(seconds, gap)

    def _highs(self, seconds: float, gap: float) -> Answer:
        goal = np.zeros(len(self.binary))
        np.add.at(goal, [number for number, _ in self.goal], [factor for _, factor in self.goal])
        lengths = [len(numbers) for _, numbers, _, _ in self.rows]
        columns = np.concatenate([numbers for _, numbers, _, _ in self.rows])
        factors = np.concatenate([row[0] for row in self.rows])
        place = (np.repeat(np.arange(len(self.rows)), lengths), columns)
        matrix = sparse.csr_array((factors, place), shape=(len(self.rows), len(self.binary)))
        low, high = np.array([row[2:] for row in self.rows]).T
        binary = np.array(self.binary)
        result = optimize.milp(
            goal,
            integrality=binary.astype(int),
            bounds=(np.zeros(len(binary)), np.where(binary, 1.0, self.limit)),
            constraints=optimize.LinearConstraint(matrix, low, high),
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )
        bound = result.mip_dual_bound
        return Answer(result.x, float(bound) if bound is not None and np.isfinite(bound) else 0.0)

    def _cp_sat(self, seconds: float, gap: float) -> Answer:
        try:
            from ortools.sat.python import cp_model
        except ImportError as error:
            raise UserError("CP-SAT is not installed; run: pip install 'equipoise[place]'") from error
        model, top = cp_model.CpModel(), int(np.ceil(self.limit * SCALE))
        made = [model.new_bool_var("") if one else model.new_int_var(0, top, "") for one in self.binary]
        loss = 0
        for factors, numbers, low, high in self.rows:
            whole, low, high, rounded = self._whole(factors, numbers, low, high)
            loss = max(loss, rounded)
            total = cp_model.LinearExpr.weighted_sum([made[number] for number in numbers], whole.tolist())
            model.add_linear_constraint(total, low, high)
        model.minimize(sum(factor * made[number] for number, factor in self.goal))
        solver = cp_model.CpSolver()
        solver.parameters.max_time_in_seconds = seconds
        solver.parameters.relative_gap_limit = gap
        solver.parameters.num_workers = 1  # one worker and a seed give one answer, whatever else the machine does
        solver.parameters.random_seed = 0
        status = solver.solve(model)
        unit = np.where(self.binary, 1.0, 1.0 / SCALE)
        found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
        values = np.array([solver.value(one) for one in made]) * unit if found else None
        # Rounding changed a row by at most ``loss`` / SCALE, hence each continuous variable that it bounds from below.
        error = loss / SCALE * sum(abs(factor) for _, factor in self.goal)
        return Answer(values, max(0.0, solver.best_objective_bound / SCALE - error))

    def _whole(
        self,
        factors: Num[np.ndarray, " terms"],
        numbers: Int[np.ndarray, " terms"],
        low: int | float,
        high: int | float,
    ) -> tuple[Int[np.ndarray, " terms"], int, int, float]:
        """The row in whole numbers, and by how much (in 1 / SCALE) the rounding may have moved its sum."""
        continuous = ~np.array(self.binary)[numbers]
        scale = SCALE if continuous.any() else 1
        scaled = np.where(continuous, factors, factors * scale)
        whole = np.round(scaled).astype(np.int64)
        limits = [int(np.clip(np.round(limit * scale), -(2**62), 2**62)) for limit in (low, high)]
        return whole, limits[0], limits[1], float(np.abs(scaled - whole).sum()) + 0.5
