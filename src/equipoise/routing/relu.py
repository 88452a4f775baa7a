"""ReMoE's scores: the positive part of the logits."""

from equipoise.contracts import Call, Scores
from equipoise.routing.scorer import Scorer


class Relu(Scorer):
    """``gate = relu(logit)``, ``choice = logit``; losses read the gates normalised over E, 0 where no gate is positive.

    Source: ReMoE (2412.14711) and its authors' code. Differs: no.
    """

    def forward(self, call: Call) -> Scores:
        """Score every token against every expert."""
        logit_TE = call.router(call.x_TD)
        gate_TE = logit_TE.relu()
        return Scores(logit_TE, gate_TE / (gate_TE.sum(-1, keepdim=True) + 1e-20), gate_TE, logit_TE)
