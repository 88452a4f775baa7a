"""A fitted law: its parameters, how sure they are, and what it recommends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float

from equipoise.errors import UserError, require
from equipoise.scaling.allocation import Candidates, Optimum, best_expert_model
from equipoise.scaling.bootstrap import Interval, interval_of
from equipoise.scaling.form import CHINCHILLA, Form
from equipoise.scaling.runs import Runs
from equipoise.scaling.surface import Surface


@dataclass(frozen=True)
class ScalingLaw:
    """A law fitted to runs. Its five parameters are ``.E .A .B .alpha .beta``; all are in ``parameters``.

    Attributes:
        form: which terms it has.
        runs: what it was fitted to.
        parameters: every parameter by name; loss in nats per token, sizes as plain counts.
        draws: the parameters refitted to losses that chance might have given, in the form's order.
        confidence: share of the intervals.
        warnings: what the runs cannot tell, a sentence each.
    """

    form: Form
    runs: Runs
    parameters: Mapping[str, float]
    draws: Float[np.ndarray, "R P"]
    confidence: float
    warnings: tuple[str, ...] = field(default=())

    @property
    def E(self) -> float:
        """Irreducible loss, nats per token."""
        return self.parameters["E"]

    @property
    def A(self) -> float:
        """Coefficient of the parameters."""
        return self.parameters["A"]

    @property
    def B(self) -> float:
        """Coefficient of the tokens."""
        return self.parameters["B"]

    @property
    def alpha(self) -> float:
        """Exponent of the parameters."""
        return self.parameters["alpha"]

    @property
    def beta(self) -> float:
        """Exponent of the tokens."""
        return self.parameters["beta"]

    @property
    def surface(self) -> Surface:
        """The five parameters; without the extra terms of a law that has some."""
        return Surface(self.E, self.A, self.B, self.alpha, self.beta)

    @property
    def drawn_surfaces(self) -> Surface:
        """The five parameters of all draws at once."""
        places = [self.form.parameters.index(name) for name in Surface._fields]
        return Surface(*self.draws[:, places].T)

    @property
    def intervals(self) -> dict[str, Interval]:
        """The interval of every parameter and, without extra terms, of ``a``."""
        known = {name: interval_of(draw, self.confidence) for name, draw in zip(self.form.parameters, self.draws.T)}
        if self.form != CHINCHILLA:
            return known
        return known | {"a": interval_of(np.asarray(self.drawn_surfaces.params_exponent), self.confidence)}

    @property
    def a(self) -> float:
        """Compute-optimal model size grows as compute^a: beta / (alpha + beta). Fails: UserError with extra terms."""
        require(self.form == CHINCHILLA, "A law with extra terms has no single exponent a; ask for optimum(flops).")
        return float(self.surface.params_exponent)

    def predict(self, features: Mapping[str, Float[np.ndarray, " N"]]) -> Float[np.ndarray, " N"]:
        """The loss at these features, as ``Runs.features`` names them."""
        return self.form.loss(self._estimate, features)[0]

    def optimum(self, flops: float, candidates: Candidates | None = None) -> Optimum:
        """The model size, the tokens and, with extra terms, the experts that reach the lowest loss for so many FLOPs.

        Args:
            flops: training FLOPs.
            candidates: for a law with extra terms, the expert models to choose among.

        Fails: UserError for flops that are not positive, and where candidates are missing or have no use.
        """
        require(0 < flops < np.inf, f"flops must be above 0, not {flops}.")
        factor = self.runs.flops_per_product
        if self.form != CHINCHILLA:
            if candidates is None:
                raise UserError("This law has terms for experts; give candidates=Candidates(experts=..., top_k=...).")
            parameters = np.vstack([self._estimate, self.draws])
            return best_expert_model(self.form, parameters, flops, factor, candidates, self.confidence)
        require(candidates is None, "This law has no terms for experts, so it cannot choose among candidates.")
        surfaces, best = self.drawn_surfaces, self.surface
        return Optimum(
            flops=flops,
            params=float(best.best_params(flops, factor)),
            tokens=float(best.best_tokens(flops, factor)),
            loss=float(best.best_loss(flops, factor)),
            intervals={
                "params": interval_of(np.asarray(surfaces.best_params(flops, factor)), self.confidence),
                "tokens": interval_of(np.asarray(surfaces.best_tokens(flops, factor)), self.confidence),
                "loss": interval_of(np.asarray(surfaces.best_loss(flops, factor)), self.confidence),
            },
        )

    @property
    def _estimate(self) -> Float[np.ndarray, "1 P"]:
        return np.array([[self.parameters[name] for name in self.form.parameters]])

    def warned(self, warnings: tuple[str, ...]) -> ScalingLaw:
        """The same law with these warnings."""
        return replace(self, warnings=warnings)
