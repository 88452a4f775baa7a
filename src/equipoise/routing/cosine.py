"""Cosine scores with a learnable temperature."""

import math

import torch
from torch import nn

from equipoise.contracts import Call, Scores
from equipoise.errors import require
from equipoise.routing.scorer import Scorer

COLDEST = 0.01


class Cosine(Scorer):
    """``logit = cos(x, w_e) / temperature`` with the router's rows w_e; ``prob = gate = choice = softmax(logit)``.

    Lengths of tokens and of router rows change nothing. The temperature is learnt as its logarithm, and stays above
    0.01.

    Args:
        num_experts: E.
        temperature: at the start.

    Source: X-MoE (2204.09179), section 3.2, for cosine scores with a learnable temperature; Tutel's ``cosine_top`` gate
    for the logarithm, its bound and the start. Differs: tokens are not projected to fewer dimensions first.
    """

    def __init__(self, num_experts: int, *, temperature: float = 0.5):
        super().__init__(num_experts)
        right = COLDEST <= temperature < math.inf
        require(right, f"cosine.temperature={temperature} is no temperature; give a number of at least {COLDEST}.")
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(temperature)))  # not 0-d: FSDP shards no scalars

    def forward(self, call: Call) -> Scores:
        """Score every token against every expert."""
        product_TE = call.router(call.x_TD)
        dtype = product_TE.dtype
        length_T = torch.linalg.vector_norm(call.x_TD.to(dtype), dim=-1, keepdim=True)
        length_E = torch.linalg.vector_norm(call.router.weight.to(dtype), dim=-1)
        scale = self.log_scale.to(dtype).clamp(max=-math.log(COLDEST)).exp()
        logit_TE = scale * product_TE / (length_T * length_E).clamp(min=1e-20)
        prob_TE = logit_TE.softmax(-1)
        return Scores(logit_TE, prob_TE, prob_TE, prob_TE)
