"""Softmax scores."""

from equipoise.contracts import Call, Scores
from equipoise.routing.scorer import Scorer


class Softmax(Scorer):
    """``prob = gate = choice = softmax(logit)`` over all experts, before selection.

    Source: Shazeer et al. 2017 (1701.06538), eq. 2, without its noise; Switch (2101.03961), eq. 1.
    Differs: no.
    """

    def forward(self, call: Call) -> Scores:
        """Score every token against every expert."""
        logit_TE = call.router(call.x_TD)
        prob_TE = logit_TE.softmax(-1)
        return Scores(logit_TE, prob_TE, prob_TE, prob_TE)
