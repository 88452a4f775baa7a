"""What a grid would teach, before anybody trains it: the same study, simulated many times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from equipoise.errors import require
from equipoise.scaling.bootstrap import bootstrap
from equipoise.scaling.form import CHINCHILLA
from equipoise.scaling.identify import refuse_unidentifiable
from equipoise.scaling.runs import Runs
from equipoise.scaling.surface import Surface
from equipoise.scaling.variable_projection import Projection

POWER, CONFIDENCE = 0.8, 0.95


@dataclass(frozen=True)
class Precision:
    """How far the fits of simulated studies scatter.

    Attributes:
        runs: trained models that a study takes.
        alpha: standard deviation of alpha.
        beta: standard deviation of beta.
        a: standard deviation of the exponent of compute-optimal size.
        params_factor: 95 % of the studies find a best size within this factor of the true one.
        loss: standard deviation, in nats, of the lowest loss at the budget.
    """

    runs: int
    alpha: float
    beta: float
    a: float
    params_factor: float
    loss: float

    def detectable_loss(self) -> float:
        """The difference in loss at the budget, nats, that two such studies, one per method, tell from chance.

        With 95 % confidence and 80 % power: (1.96 + 0.84) sqrt(2) standard deviations.
        """
        return float((norm.ppf((1 + CONFIDENCE) / 2) + norm.ppf(POWER)) * np.sqrt(2) * self.loss)

    def power(self, difference: float) -> float:
        """The chance that two such studies, one per method, tell this difference in loss at the budget from chance."""
        size = abs(difference) / (np.sqrt(2) * self.loss)
        edge = norm.ppf((1 + CONFIDENCE) / 2)
        return float(norm.sf(edge - size) + norm.cdf(-edge - size))


def simulate(surface: Surface, grid: Runs, noise: float, flops: float, repeats: int = 500, seed: int = 0) -> Precision:
    """Repeat a study on a surface believed true, with Gaussian noise, and see how far its answers scatter.

    Args:
        surface: the truth, such as that of a first small fit.
        grid: the layout; its losses are replaced by the surface's.
        noise: standard deviation of one run's loss, nats: what different seeds give.
        flops: the budget asked about.
        repeats: simulated studies.
        seed: of their noise.

    Fails: UserError for noise or repeats that are not positive, and for a grid that cannot tell the parameters apart.
    """
    require(noise > 0, f"noise must be above 0 nats, not {noise}.")
    require(repeats > 1, f"repeats must be at least 2, not {repeats}.")
    refuse_unidentifiable(CHINCHILLA, grid)
    truth = np.asarray(surface.loss(grid.params, grid.tokens))
    losses = truth + np.random.default_rng(seed).normal(0, noise, (repeats, len(truth)))
    projection = Projection(CHINCHILLA.log_features(grid.features()))
    start = np.array([surface.alpha, surface.beta], dtype=np.float64)
    found = Surface(*np.hstack(bootstrap(projection, losses, start, "l-bfgs-b", progress=False)).T)
    best = np.asarray(found.best_params(flops, grid.flops_per_product))
    off = np.abs(np.log(best / surface.best_params(flops, grid.flops_per_product)))
    return Precision(
        runs=len(truth),
        alpha=float(np.std(found.alpha)),
        beta=float(np.std(found.beta)),
        a=float(np.std(found.params_exponent)),
        params_factor=float(np.exp(np.quantile(off, CONFIDENCE, method="higher"))),
        loss=float(np.std(found.best_loss(flops, grid.flops_per_product))),
    )
