"""Noisy top-k gating: learned noise on the logits lets tokens try other experts."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.contracts import Call, Scores
from equipoise.routing.keyed import new_key, normal
from equipoise.routing.router import Router, multiply
from equipoise.routing.scorer import Scorer


class NoisyRouter(Router):
    """A router with a second matrix for the scale of the noise on each logit; ``softplus(0)`` = 0.69 at first.

    Args:
        dim: D, width of the model.
        num_experts: E.
    """

    def __init__(self, dim: int, num_experts: int):
        super().__init__(dim, num_experts)
        self.noise = nn.Parameter(torch.zeros(num_experts, dim))

    def noise_scale(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """The standard deviation of the noise on every logit, at least 1e-10."""
        return F.softplus(multiply(x_TD, self.noise)).clamp(min=1e-10)


class Noisy(Scorer):
    """``choice = logit + scale * normal`` in training, the plain logit in evaluation; ``gate = softmax(choice)``.

    Made to sum to 1 over the chosen, the gates are the softmax of the K kept logits. The normal numbers follow from the
    optimizer step, the expert and the token's place among the real tokens of the call: recomputation and padding change
    nothing, and the micro-batches of a step draw alike. Losses read the softmax of the plain logits.

    Args:
        num_experts: E.
        noise: draw it; without, training routes as evaluation does.

    Source: Shazeer et al. 2017 (1701.06538), eq. 3 to 5. Differs: with K = 1 the weight is the softmax over all
    experts, since the paper's would be the constant 1; the first matrix starts random as in every router here, there
    at 0; noise is keyed, not drawn from a stream.
    """

    key: Tensor

    def __init__(self, num_experts: int, *, noise: bool = True):
        super().__init__(num_experts)
        self.noise = noise
        self.register_buffer("key", new_key())

    def make_router(self, dim: int) -> nn.Module:
        """A router that knows its noise, too."""
        return NoisyRouter(dim, self.num_experts)

    def forward(self, call: Call) -> Scores:
        """Score every token against every expert."""
        router: Any = call.router
        logit_TE = choice_TE = router(call.x_TD)
        if call.training:  # without noise too: DDP waits for the second matrix, so it must be in every graph
            choice_TE = logit_TE + self._normal(call, logit_TE) * router.noise_scale(call.x_TD)
        return Scores(logit_TE, logit_TE.softmax(-1), choice_TE.softmax(-1), choice_TE)

    def _normal(self, call: Call, logit_TE: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """What is drawn for every logit; 0 without noise."""
        if not self.noise:
            return torch.zeros_like(logit_TE)
        normal_TE = normal(self.key, call.step, tuple(logit_TE.shape)).to(logit_TE.dtype)
        if call.mask_T is None:
            return normal_TE
        return normal_TE.index_select(0, (call.mask_T.cumsum(0) - 1).clamp(min=0))
