"""The shape of a law: which power of which feature each of its coefficients multiplies."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

CONSTANT = "E"


@dataclass(frozen=True)
class Form:
    """``loss = sum over coefficients c of c * product over its (exponent, feature) of feature^-exponent``.

    For fixed exponents the loss is linear in the coefficients: that is what variable projection lives from.

    Attributes:
        powers: per coefficient, its exponents and the feature that each of them lowers.
    """

    powers: Mapping[str, Mapping[str, str]]

    @property
    def coefficients(self) -> tuple[str, ...]:
        """The linear parameters, the irreducible loss E first."""
        return tuple(self.powers)

    @property
    def exponents(self) -> tuple[str, ...]:
        """The non-linear parameters, in the order in which they appear."""
        return tuple(dict.fromkeys(name for powers in self.powers.values() for name in powers))

    @property
    def parameters(self) -> tuple[str, ...]:
        """All parameters: the coefficients, then the exponents."""
        return self.coefficients + self.exponents

    @property
    def features(self) -> tuple[str, ...]:
        """The quantities that the law reads."""
        return tuple(dict.fromkeys(name for powers in self.powers.values() for name in powers.values()))

    def log_features(self, values: Mapping[str, Float[np.ndarray, " N"]]) -> Float[np.ndarray, "C X N"]:
        """ln of the feature that exponent X lowers in the term of coefficient C; 0 where it is not in that term."""
        count = len(next(iter(values.values())))
        logs = np.zeros((len(self.coefficients), len(self.exponents), count))
        for row, powers in enumerate(self.powers.values()):
            for exponent, feature in powers.items():
                logs[row, self.exponents.index(exponent)] = np.log(values[feature])
        return logs

    def loss(
        self, parameters: Float[np.ndarray, "R P"], values: Mapping[str, Float[np.ndarray, " N"]]
    ) -> Float[np.ndarray, "R N"]:
        """What every set of parameters (coefficients, then exponents) says of every point."""
        count = len(self.coefficients)
        coefficients, exponents = parameters[:, :count], parameters[:, count:]
        columns = np.exp(-np.einsum("cxn,rx->rcn", self.log_features(values), exponents))
        return np.einsum("rcn,rc->rn", columns, coefficients)


CHINCHILLA = Form({CONSTANT: {}, "A": {"alpha": "params"}, "B": {"beta": "tokens"}})

EXTRA_TERMS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "total": ("T", {"gamma": "total"}),
    "sparsity": ("P", {"lambda": "density"}),
    "granularity": ("R", {"alpha": "params", "delta": "granularity"}),
}


def form_of(extra: Collection[str]) -> Form:
    """The five-parameter surface with extra terms for Mixture-of-Experts models.

    With N active parameters, M total parameters, D tokens and granularity G:

    - ``total`` adds ``T M^-gamma``: what parameters are worth that a token does not visit.
    - ``sparsity`` adds ``P (M/N)^lambda``, which grows as the model becomes sparser: without such a term more experts
      are better without end.
    - ``granularity`` adds ``R G^-delta N^-alpha``: what finer experts are worth.

    Source: Hoffmann et al. 2022 (arXiv 2203.15556), approach 3; the first two terms are Abnar et al. 2025 (arXiv
    2501.12370), whose last term ``d / ((1-S)^delta N^gamma)`` becomes a power of the active parameters; the third is
    Krajewski et al. 2024 (arXiv 2402.07871). Differs: Abnar's delta is tied to gamma, and lambda is positive (both
    INFERRED).
    """
    chosen = [EXTRA_TERMS[name] for name in EXTRA_TERMS if name in extra]
    return Form({**CHINCHILLA.powers, **dict(chosen)})
