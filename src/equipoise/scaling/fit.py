"""Fit a scaling law to training runs: the estimate, its intervals and what the runs cannot tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from equipoise.errors import UserError, require
from equipoise.scaling.bootstrap import bootstrap, redraw
from equipoise.scaling.form import EXTRA_TERMS, Form, form_of
from equipoise.scaling.identify import refuse_unidentifiable, warnings_of
from equipoise.scaling.law import ScalingLaw
from equipoise.scaling.runs import Runs, read_runs
from equipoise.scaling.variable_projection import INNERS, SOLVERS, Projection, search


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How to fit.

    Attributes:
        extra: terms for Mixture-of-Experts models beside the five parameters; see ``form_of``.
        solver: what searches the exponents. ``nelder-mead`` needs no gradient, ``l-bfgs-b`` uses the analytic one,
            ``grid`` tries every pair in steps of 0.01 (its intervals are refined by Nelder-Mead).
        inner: what solves the coefficients: ``nnls`` keeps them at or above 0, ``ols`` does not.
        huber: residuals beyond so many nats count linearly; None for least squares.
        bootstraps: refits behind the intervals; 0 for none.
        confidence: share of the intervals.
        seed: of the refits.
    """

    extra: tuple[str, ...] = ()
    solver: str = "nelder-mead"
    inner: str = "nnls"
    huber: float | None = None
    bootstraps: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def check(self) -> None:
        """Fails: UserError at the first value that is not allowed."""
        for name, choices in (("solver", SOLVERS), ("inner", INNERS)):
            value = getattr(self, name)
            require(value in choices, f"{name} must be one of {', '.join(choices)}, not {value!r}.")
        unknown = [name for name in self.extra if name not in EXTRA_TERMS]
        require(not unknown, f"extra terms are {', '.join(EXTRA_TERMS)}, not {', '.join(unknown)}.")
        require(self.solver != "grid" or not self.extra, "Solver grid tries pairs of exponents only; use nelder-mead.")
        require(self.huber is None or self.huber > 0, f"huber must be above 0 nats, not {self.huber}.")
        require(self.bootstraps >= 0, f"bootstraps must be at least 0, not {self.bootstraps}.")
        require(0 < self.confidence < 1, f"confidence must be between 0 and 1, not {self.confidence}.")


def fit_scaling_law(
    params: Any, tokens: Any = None, loss: Any = None, *, progress: bool = False, **settings: Any
) -> ScalingLaw:
    """Fit ``L = E + A N^-alpha + B D^-beta`` (and extra terms) by variable projection.

    Args:
        params: active parameters of each run; or ``Runs``; or the path of a CSV or JSON file with one method's runs.
        tokens: training tokens of each run, with ``params`` as an array.
        loss: final loss of each run in nats per token, with ``params`` as an array.
        progress: show a bar on standard error.
        settings: fields of ``FitSettings``, such as ``solver="l-bfgs-b"``, ``huber=0.01`` or ``bootstraps=0``.

    Returns:
        The law: ``.alpha .beta .E .A .B``, ``.intervals``, ``.optimum(flops)``, ``.warnings``.

    Fails: UserError for fewer than 4 runs, values that are not finite or not positive, units that make no sense, one
    budget only, and runs that cannot tell the parameters apart (they are named).
    Source: VPNLS, arXiv 2603.22339, section 6. Differs: features are centred by their geometric mean; intervals and
    warnings are added.
    """
    known = [field.name for field in fields(FitSettings)]
    unknown = [name for name in settings if name not in known]
    require(not unknown, f"Unknown setting {', '.join(unknown)}; there are {', '.join(known)}.")
    chosen = FitSettings(**settings)
    chosen.check()
    return fit_runs(_runs(params, tokens, loss), chosen, progress)


def fit_runs(runs: Runs, settings: FitSettings, progress: bool = False) -> ScalingLaw:
    """As ``fit_scaling_law``, from runs and settings."""
    form = form_of(settings.extra)
    refuse_unidentifiable(form, runs)
    centred, centres = _centred(form, runs)
    projection = Projection(form.log_features(centred), settings.inner, settings.huber)
    exponents = search(projection, runs.loss, settings.solver)
    coefficients, _ = projection.solve(projection.columns(exponents), runs.loss)
    draws = np.empty((0, len(form.parameters)))
    if settings.bootstraps and len(runs.loss) > len(form.parameters):
        losses = redraw(projection, runs.loss, exponents, settings.bootstraps, np.random.default_rng(settings.seed))
        found = bootstrap(projection, losses, exponents, settings.solver, progress)
        draws = _uncentred(form, *found, centres)
    values = _uncentred(form, coefficients[None], exponents[None], centres)[0]
    law = ScalingLaw(
        form=form,
        runs=runs,
        parameters=dict(zip(form.parameters, map(float, values))),
        draws=draws,
        confidence=settings.confidence,
    )
    return law.warned(warnings_of(law))


def _runs(params: Any, tokens: Any, loss: Any) -> Runs:
    if isinstance(params, Runs | str | Path):
        require(tokens is None and loss is None, "Give runs or a file alone, without tokens and loss.")
        if isinstance(params, Runs):
            return params
        methods = read_runs(params)
        names = ", ".join(methods)
        require(len(methods) == 1, f"{params} holds several methods ({names}); fit each of read_runs(...) by itself.")
        return next(iter(methods.values()))
    if tokens is None or loss is None:
        raise UserError("A law needs params, tokens and loss of every run, or one file that holds them.")
    return Runs.of(params=params, tokens=tokens, loss=loss)


def _centred(form: Form, runs: Runs) -> tuple[dict[str, Float[np.ndarray, " N"]], dict[str, float]]:
    """Features over their geometric mean, and that mean: columns then differ little in size."""
    values = runs.features()
    centres = {name: float(np.exp(np.log(values[name]).mean())) for name in form.features}
    return {name: values[name] / centre for name, centre in centres.items()}, centres


def _uncentred(
    form: Form,
    coefficients: Float[np.ndarray, "R C"],
    exponents: Float[np.ndarray, "R X"],
    centres: Mapping[str, float],
) -> Float[np.ndarray, "R P"]:
    """All parameters, the coefficients for features as they are."""
    log_centres = form.log_features({name: np.array([centre]) for name, centre in centres.items()})[:, :, 0]
    return np.hstack([coefficients * np.exp(exponents @ log_centres.T), exponents])
