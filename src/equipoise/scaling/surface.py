"""The five-parameter surface ``L = E + A N^-alpha + B D^-beta`` and its compute-optimal frontier."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from equipoise.scaling.runs import FLOPS_PER_PRODUCT

Number = float | Float[np.ndarray, "..."]


class Surface(NamedTuple):
    """A surface of loss over N parameters and D tokens; arrays hold several surfaces at once.

    Source: Hoffmann et al. 2022 (arXiv 2203.15556), eq. 2 and 4. Differs: no.
    """

    E: Number
    A: Number
    B: Number
    alpha: Number
    beta: Number

    def loss(self, params: Number, tokens: Number) -> Number:
        """The loss in nats per token."""
        return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta

    @property
    def params_exponent(self) -> Number:
        """``a`` of N* = G (C/6)^a: beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def tokens_exponent(self) -> Number:
        """``b`` of D* = (C/6)^b / G: alpha / (alpha + beta)."""
        return self.alpha / (self.alpha + self.beta)

    def best_params(self, flops: Number, flops_per_product: float = FLOPS_PER_PRODUCT) -> Number:
        """N*, the parameters with the lowest loss where C = ``flops_per_product`` * N * D.

        0 or infinity where A or B is 0: then one of the two is worth nothing.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            balance = np.log(np.asarray(self.alpha * self.A)) - np.log(np.asarray(self.beta * self.B))
            power = (balance + self.beta * np.log(np.asarray(flops / flops_per_product))) / (self.alpha + self.beta)
            return np.exp(power)[()]

    def best_tokens(self, flops: Number, flops_per_product: float = FLOPS_PER_PRODUCT) -> Number:
        """D*, the tokens that go with ``best_params``."""
        with np.errstate(divide="ignore"):
            return np.divide(flops / flops_per_product, self.best_params(flops, flops_per_product))[()]

    def best_loss(self, flops: Number, flops_per_product: float = FLOPS_PER_PRODUCT) -> Number:
        """The lowest loss that so many FLOPs can buy."""
        params = self.best_params(flops, flops_per_product)
        with np.errstate(divide="ignore", invalid="ignore"):
            loss = self.loss(params, np.divide(flops / flops_per_product, params))
        return np.where(np.asarray(self.A * self.B) > 0, loss, self.E)[()]
