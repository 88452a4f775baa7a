"""The two losses of noisy top-k gating: even importance, and even expected load."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from equipoise.balancing.balancer import Balancer
from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require


class ImportanceLoad(Balancer):
    """``CV(importance)^2 + load * CV(load)^2``: 0 is balanced; CV is the standard deviation over the mean.

    An expert's importance is the sum of its combine weights. Its load is a smooth one: the expected number of tokens
    that would choose it if its noise alone were drawn again, the normal distribution of (clean logit - what it must
    exceed) / noise scale. It needs the scorer ``noisy``.

    Args:
        num_experts: E.
        load: weight of the second term beside the first.
        weight: of the sum.

    Source: Shazeer et al. 2017 (1701.06538), eq. 6 to 11; both weights 0.1 as in its language models. Differs: sums are
    means over the tokens, which CV does not see; with K = E every load is certain, and the second term 0.
    """

    def __init__(self, num_experts: int, *, load: float = 1.0, weight: float = 0.1):
        super().__init__()
        require(0 <= load < math.inf, f"importance_load.load={load} is no weight; give a number of at least 0.")
        require(0 <= weight < math.inf, f"importance_load.weight={weight} is no weight; give a number of at least 0.")
        self.load, self.weight = load, weight

    def loss(self, call: Call, scores: Scores, routing: Routing) -> Tensor:
        """The scalar loss; 0 without tokens."""
        num_experts = scores.gate_TE.shape[1]
        importance_E = scores.gate_TE.new_zeros(num_experts + 1).index_add(0, routing.expert_N, routing.weight_N)
        loss = squared_variation(importance_E[:-1] / call.tokens().clamp(min=1))
        if call.k == num_experts or not call.x_TD.shape[0]:  # a step without a call may not gather sharded parameters
            return loss
        router: Any = call.router
        scale_TE = router.noise_scale(call.x_TD)
        chance_TE = chances(scores.logit_TE, scores.choice_TE, scale_TE, call.k)
        return loss + self.load * squared_variation(call.mean(chance_TE))


def chances(
    clean_TE: Float[Tensor, "T E"], noisy_TE: Float[Tensor, "T E"], scale_TE: Float[Tensor, "T E"], k: int
) -> Float[Tensor, "T E"]:
    """How likely expert e stays among the K best of token t when only its own noise is drawn again."""
    best_TK = noisy_TE.topk(k + 1, dim=-1).values
    last_T1, next_T1 = best_TK[:, k - 1 : k], best_TK[:, k:]
    exceeds_TE = torch.where(noisy_TE > next_T1, next_T1, last_T1)  # the K-th best of the others
    return torch.special.ndtr((clean_TE - exceeds_TE) / scale_TE)


def squared_variation(value_E: Float[Tensor, " E"]) -> Float[Tensor, ""]:
    """The variance over the squared mean."""
    return value_E.var(unbiased=False) / value_E.mean().square().clamp(min=1e-20)
