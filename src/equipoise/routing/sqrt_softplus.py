"""Square-root-of-softplus scores."""

import torch.nn.functional as F

from equipoise.contracts import Call, Scores
from equipoise.routing.scorer import Scorer


class SqrtSoftplus(Scorer):
    """``gate = choice = sqrt(softplus(logit))``: positive and unbounded; losses read the scores normalised over E.

    Source: Megatron-Core's ``sqrtsoftplus`` score function. Differs: softplus is kept above 1e-20, where the root's
    gradient would be infinite.
    """

    def forward(self, call: Call) -> Scores:
        """Score every token against every expert."""
        logit_TE = call.router(call.x_TD)
        score_TE = F.softplus(logit_TE).clamp(min=1e-20).sqrt()
        prob_TE = score_TE / (score_TE.sum(-1, keepdim=True) + 1e-20)
        return Scores(logit_TE, prob_TE, score_TE, score_TE)
