"""The router z-loss: keeps logits small."""

import math

from torch import Tensor

from equipoise.balancing.balancer import Balancer
from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require


class ZLoss(Balancer):
    """``mean_t logsumexp(logit_t)^2`` over the real tokens.

    Args:
        num_experts: E.
        weight: of the loss.

    Source: ST-MoE (2202.08906), eq. 5. Differs: no.
    """

    def __init__(self, num_experts: int, *, weight: float = 1e-3):
        super().__init__()
        require(0 <= weight < math.inf, f"z_loss.weight={weight} is no weight; give a number of at least 0.")
        self.weight = weight

    def loss(self, call: Call, scores: Scores, routing: Routing) -> Tensor:
        """The scalar loss."""
        return call.mean(scores.logit_TE.logsumexp(-1) ** 2)
