"""Approach 3: all five parameters at once, for comparison with variable projection."""

from __future__ import annotations

import itertools

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import logsumexp

from equipoise.scaling.runs import Runs
from equipoise.scaling.surface import Surface
from equipoise.scaling.variable_projection import EXPONENT_RANGE

EXPONENTS = np.linspace(0.05, 0.95, 4)
STARTS = (
    np.log(np.linspace(0.1, 5, 4)),
    np.log(np.logspace(1, 4, 4)),
    np.log(np.logspace(1, 4, 4)),
    EXPONENTS,
    EXPONENTS,
)
LOG_COEFFICIENTS = ((np.log(1e-6), np.log(10)), (np.log(1e-6), np.log(1e6)), (np.log(1e-6), np.log(1e6)))
CHINCHILLA_HUBER = 1e-3
Logs = tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]  # of parameters and tokens


def fit_approach3(runs: Runs, huber: float | None = CHINCHILLA_HUBER) -> Surface:
    """Minimise the residuals of ln(loss) over ln E, ln A, ln B, alpha and beta with L-BFGS-B.

    Args:
        runs: what to fit.
        huber: residuals of ln(loss) beyond it count linearly; None for least squares.

    Source: Hoffmann et al. 2022 (arXiv 2203.15556), approach 3 (log-sum-exp, Huber 1e-3). Differs: it descends from the
    best point of a grid of 4^5 instead of from every point of one with 4,500, as arXiv 2603.22339 does.
    """
    log_loss = np.log(runs.loss)
    logs = np.log(runs.params), np.log(runs.tokens)

    def score(start: Float[np.ndarray, " P"]) -> tuple[float, Float[np.ndarray, " P"]]:
        return _score(start, logs, log_loss, huber)

    start = min(map(np.array, itertools.product(*STARTS)), key=lambda point: _squares(point, logs, runs.loss))
    bounds = [*LOG_COEFFICIENTS, EXPONENT_RANGE, EXPONENT_RANGE]
    options = {"ftol": 1e-15, "gtol": 1e-15, "maxiter": 1000}
    found = minimize(score, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    e, a, b, alpha, beta = map(float, found)
    return Surface(np.exp(e), np.exp(a), np.exp(b), alpha, beta)


def _log_terms(point: Float[np.ndarray, " P"], logs: Logs) -> Float[np.ndarray, "3 N"]:
    e, a, b, alpha, beta = point
    return np.stack([np.full_like(logs[0], e), a - alpha * logs[0], b - beta * logs[1]])


def _squares(point: Float[np.ndarray, " P"], logs: Logs, loss: Float[np.ndarray, " N"]) -> float:
    residuals = loss - np.exp(_log_terms(point, logs)).sum(0)
    return float(residuals @ residuals)


def _score(
    point: Float[np.ndarray, " P"],
    logs: Logs,
    log_loss: Float[np.ndarray, " N"],
    huber: float | None,
) -> tuple[float, Float[np.ndarray, " P"]]:
    """The sum of (capped) squared residuals, and its gradient."""
    terms = _log_terms(point, logs)
    total = logsumexp(terms, axis=0)
    residuals = total - log_loss
    pull = residuals if huber is None else np.clip(residuals, -huber, huber)
    share = np.exp(terms - total) * pull  # what each term contributes to the slope
    slopes = share.sum(1)
    gradient = 2 * np.array([*slopes, -(share[1] @ logs[0]), -(share[2] @ logs[1])])
    return float((pull * (2 * residuals - pull)).sum()), gradient
