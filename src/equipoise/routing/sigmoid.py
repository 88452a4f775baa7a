"""Sigmoid scores."""

from equipoise.contracts import Call, Scores
from equipoise.routing.scorer import Scorer


class Sigmoid(Scorer):
    """``gate = choice = sigmoid(logit)``: every expert is scored by itself; losses read the scores normalised over E.

    Source: DeepSeek-V3 (2412.19437), eq. 15; the normalisation for losses is its eq. 19. Differs: no.
    """

    def forward(self, call: Call) -> Scores:
        """Score every token against every expert."""
        logit_TE = call.router(call.x_TD)
        score_TE = logit_TE.sigmoid()
        prob_TE = score_TE / (score_TE.sum(-1, keepdim=True) + 1e-20)
        return Scores(logit_TE, prob_TE, score_TE, score_TE)
