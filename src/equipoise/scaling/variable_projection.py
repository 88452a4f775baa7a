"""Variable projection: search the exponents only, and solve the linear coefficients exactly at every step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize, nnls

SOLVERS = ("nelder-mead", "l-bfgs-b", "grid")
INNERS = ("nnls", "ols")

MOST_REWEIGHTINGS = 10
STARTS = {1: 128, 2: 32, 3: 12, 4: 7, 5: 5}  # grid points per exponent, by the number of exponents
EXPONENT_RANGE = (0.01, 0.99)
GRID_STEP = 0.01
EXACT = 1e-6  # of the loss: residuals this small are none


@dataclass(frozen=True)
class Projection:
    """A law's form at given runs: for every choice of exponents, the best coefficients and what they leave.

    Attributes:
        log_features: ln of the features, centred (see ``centred``), by coefficient, exponent and run.
        inner: ``nnls`` keeps every coefficient at or above 0, ``ols`` does not.
        huber: residuals beyond it count linearly; None for plain least squares.

    Source: variable projection as in arXiv 2603.22339, section 6. Differs: features are divided by their geometric mean
    instead of by 1e6 and 1e9, which keeps the columns alike in size for models of any scale.
    """

    log_features: Float[np.ndarray, "C X N"]
    inner: str = "nnls"
    huber: float | None = None

    def columns(self, exponents: Float[np.ndarray, " X"]) -> Float[np.ndarray, "N C"]:
        """What the coefficients multiply."""
        return np.exp(-np.einsum("cxn,x->nc", self.log_features, exponents))

    def solve(
        self, columns: Float[np.ndarray, "N C"], loss: Float[np.ndarray, " N"]
    ) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " N"]]:
        """The coefficients and the weights of the runs, which are 1 unless residuals are capped."""
        weights = np.ones(len(loss))
        coefficients = self._linear(columns, loss)
        if self.huber is None:
            return coefficients, weights
        for _ in range(MOST_REWEIGHTINGS):
            residuals = np.abs(loss - columns @ coefficients)
            weights = np.minimum(1.0, self.huber / np.maximum(residuals, self.huber))
            root = np.sqrt(weights)
            before, coefficients = coefficients, self._linear(columns * root[:, None], loss * root)
            if np.allclose(before, coefficients, rtol=1e-10, atol=0):
                break
        return coefficients, weights

    def score(self, exponents: Float[np.ndarray, " X"], loss: Float[np.ndarray, " N"]) -> float:
        """The sum of squared residuals; capped ones count 2 huber |r| - huber^2."""
        columns = self.columns(exponents)
        return self._capped(loss - columns @ self.solve(columns, loss)[0])

    def score_and_gradient(
        self, exponents: Float[np.ndarray, " X"], loss: Float[np.ndarray, " N"]
    ) -> tuple[float, Float[np.ndarray, " X"]]:
        """The score and its derivative by the exponents.

        The coefficients are optimal, so their own change contributes nothing: for alpha it is
        ``2 A sum r ln(N) N^-alpha``.
        """
        columns = self.columns(exponents)
        coefficients, _ = self.solve(columns, loss)
        residuals = loss - columns @ coefficients
        pull = residuals if self.huber is None else np.clip(residuals, -self.huber, self.huber)
        gradient = 2 * np.einsum("cxn,nc,n->x", self.log_features, columns * coefficients, pull)
        return self._capped(residuals), gradient

    def jacobian(
        self, exponents: Float[np.ndarray, " X"], coefficients: Float[np.ndarray, " C"]
    ) -> Float[np.ndarray, "N P"]:
        """The derivative of every run's loss by all parameters, the coefficients first."""
        columns = self.columns(exponents)
        return np.hstack([columns, -np.einsum("cxn,nc->nx", self.log_features, columns * coefficients)])

    def _linear(self, columns: Float[np.ndarray, "N C"], loss: Float[np.ndarray, " N"]) -> Float[np.ndarray, " C"]:
        if self.inner == "nnls":
            return nnls(columns, loss)[0]
        return np.linalg.lstsq(columns, loss, rcond=None)[0]

    def _capped(self, residuals: Float[np.ndarray, " N"]) -> float:
        if self.huber is None:
            return float(residuals @ residuals)
        size = np.abs(residuals)
        return float(np.where(size <= self.huber, size**2, 2 * self.huber * size - self.huber**2).sum())


def search(projection: Projection, loss: Float[np.ndarray, " N"], solver: str) -> Float[np.ndarray, " X"]:
    """The exponents with the smallest score: a coarse grid, then the solver from its best point.

    ``grid`` tries every pair of exponents in steps of 0.01 and stays there.
    """
    number = projection.log_features.shape[1]
    if solver == "grid":
        steps = round((EXPONENT_RANGE[1] - EXPONENT_RANGE[0]) / GRID_STEP) + 1
        return best_of_grid(projection, loss, steps)
    return refine(projection, loss, best_of_grid(projection, loss, STARTS[number]), solver)


def best_of_grid(projection: Projection, loss: Float[np.ndarray, " N"], points: int) -> Float[np.ndarray, " X"]:
    """The best of a grid with so many points per exponent."""
    axis = np.linspace(*EXPONENT_RANGE, points)
    grid = itertools.product(axis, repeat=projection.log_features.shape[1])
    return min(map(np.array, grid), key=lambda exponents: projection.score(exponents, loss))


def refine(
    projection: Projection, loss: Float[np.ndarray, " N"], start: Float[np.ndarray, " X"], solver: str
) -> Float[np.ndarray, " X"]:
    """The local optimum from a start.

    Scores are divided by the start's, so that tolerances mean the same for any noise and number of runs. Where the
    start is already exact, rounding is all that is left to descend, so the divisor has a floor.
    """
    scale = max(projection.score(start, loss), float(((EXACT * loss) ** 2).sum()))
    bounds = [EXPONENT_RANGE] * len(start)
    if solver == "l-bfgs-b":

        def scaled(exponents: np.ndarray) -> tuple[float, np.ndarray]:
            score, gradient = projection.score_and_gradient(exponents, loss)
            return score / scale, gradient / scale

        options = {"ftol": 1e-15, "gtol": 1e-15}
        return minimize(scaled, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    options = {"xatol": 1e-10, "fatol": 1e-9, "maxiter": 2000 * len(start)}  # rounding moves a score by up to 1e-10
    return minimize(
        lambda exponents: projection.score(exponents, loss) / scale,
        start,
        method="Nelder-Mead",
        bounds=bounds,
        options=options,
    ).x
