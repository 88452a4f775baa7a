"""The router z-loss: keeps logits small."""

from torch import Tensor

from equipoise.balancing.balancer import Balancer
from equipoise.contracts import Call, Routing, Scores


class ZLoss(Balancer):
    """``mean_t logsumexp(logit_t)^2`` over the real tokens.

    Args:
        num_experts: E.
        weight: of the loss.

    Source: ST-MoE (2202.08906), eq. 5. Differs: no.
    """

    def __init__(self, num_experts: int, *, weight: float = 1e-3):
        super().__init__()
        self.weight = weight

    def loss(self, call: Call, scores: Scores, routing: Routing) -> Tensor:
        """The scalar loss."""
        return call.mean(scores.logit_TE.logsumexp(-1) ** 2)
