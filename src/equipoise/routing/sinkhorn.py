"""Sinkhorn routing as in Megatron: balanced prices per expert choose, plain gates weigh."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require
from equipoise.routing.selector import Selector
from equipoise.routing.top_k import TopK
from equipoise.routing.transport import sinkhorn


class Sinkhorn(Selector):
    """In training, a token takes the K largest entries of its row of the balanced ``d0_t exp(logit_te) d1_e``.

    d0 and d1 come from Sinkhorn's iteration on the call's real tokens, without gradient. Weights are the softmax of the
    logits, or their sigmoid for K = 1, and do not sum to 1. The plan looks at later tokens; evaluation is plain top-k.

    Args:
        num_experts: E.
        tolerance: stop where d1 changes by at most this, in the mean over the experts.
        max_iterations: at most.

    Fails: UserError for settings out of range.
    Source: Megatron-Core's ``sinkhorn`` load balancing, after S-BASE (Clark et al. 2022, 2202.01169). Differs: in the
    log domain, so that no logit overflows; without its 1e-8 in the denominators; the loop is bounded.
    """

    looks_ahead = True

    def __init__(self, num_experts: int, *, tolerance: float = 1e-4, max_iterations: int = 100):
        super().__init__(num_experts, renormalize=False)
        require(0 <= tolerance < math.inf, f"sinkhorn.tolerance={tolerance} must be at least 0, and finite.")
        require(max_iterations >= 1, f"sinkhorn.max_iterations={max_iterations} must be at least 1.")
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.token_choice = TopK(num_experts, renormalize=False)

    def forward(self, call: Call, scores: Scores) -> Routing:
        """Choose the rows."""
        gated = _gated(call, scores)
        return self.token_choice(
            call, replace(gated, choice_TE=self._balanced(call, scores)) if call.training else gated
        )

    def weigh(
        self, call: Call, scores: Scores, token_N: Int[Tensor, " N"], expert_N: Int[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """The combine weights of rows chosen by anyone."""
        return super().weigh(call, _gated(call, scores), token_N, expert_N)

    def _balanced(self, call: Call, scores: Scores) -> Float[Tensor, "T E"]:
        """The logarithm of the balanced plan, up to a constant per token."""
        logit_TE = scores.logit_TE.detach()
        return logit_TE + _prices(logit_TE, call.mask_T, self.tolerance, self.max_iterations)


def _gated(call: Call, scores: Scores) -> Scores:
    """The scores with the gate that K asks for."""
    return replace(scores, gate_TE=scores.logit_TE.sigmoid()) if call.k == 1 else scores


@torch.library.custom_op("equipoise::sinkhorn_prices", mutates_args=())
def _prices(logit_TE: Tensor, mask_T: Tensor | None, tolerance: float, max_iterations: int) -> Tensor:
    """The logarithm of d1; a step that the compiler does not look into, since it would unroll the loop."""

    def converged(before_E: Tensor, after_E: Tensor) -> Tensor:
        return (after_E.exp() - before_E.exp()).abs().mean() <= tolerance

    return sinkhorn(logit_TE, mask_T, max_iterations, converged, rows_first=True)[1]


@_prices.register_fake
def _(logit_TE, mask_T, tolerance, max_iterations):
    return logit_TE.new_empty(logit_TE.shape[1])
