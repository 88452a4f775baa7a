"""The Top-1 loss of Sigma-MoE-Tiny: even mean probabilities, and confident ones."""

import math

from torch import Tensor

from equipoise.balancing.balancer import Balancer
from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require


class Top1Loss(Balancer):
    """``E sum_e P_e^2 / C``, P the mean of ``softmax(logit / tau)``, C the mean of its K largest entries' sum.

    Uniform probabilities lower the usual balance loss to 1 whatever the load; here they read E/K. All tokens on one
    expert read E at K = 1; even loads of confident tokens read 1, the minimum.

    Args:
        num_experts: E.
        tau: temperature of the softmax.
        weight: of the loss.

    Source: Sigma-MoE-Tiny (2512.16248) as its project page and its authors' code have it: C over the K selected
    experts, local to the micro-batch. Differs: selected are the K largest of these probabilities, whatever a bias
    or an override chose.
    """

    def __init__(self, num_experts: int, *, tau: float = 1.0, weight: float = 1e-2):
        super().__init__()
        require(0 < tau < math.inf, f"top1_loss.tau={tau} is no temperature; give a positive number.")
        require(0 <= weight < math.inf, f"top1_loss.weight={weight} is no weight; give a number of at least 0.")
        self.tau, self.weight = tau, weight

    def loss(self, call: Call, scores: Scores, routing: Routing) -> Tensor:
        """The scalar loss; 0 without tokens."""
        prob_TE = (scores.logit_TE / self.tau).softmax(-1)
        prob_E = call.mean(prob_TE)
        chosen = call.mean(prob_TE.topk(call.k, dim=-1).values.sum(-1))
        return prob_TE.shape[1] * prob_E.square().sum() / chosen.clamp(min=1e-20)
