"""Null experts: tokens choose among true experts and some that compute nothing, so easy tokens cost less."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require
from equipoise.routing.rows import pack, unmasked, weigh
from equipoise.routing.selector import Selector

KINDS = ("zero", "identity")


class NullExperts(Selector):
    """Choose the K best of E true and m null experts per token; N = T*K rows, of which true experts compute some.

    Args:
        num_experts: E.
        nulls: m; None for as many as true ones.
        kind: what null experts answer. ``"zero"``: nothing; weights are shared among a token's true experts, and a
            token that took nulls alone gets nothing. ``"identity"``: the token itself, times the null's own weight.
        renormalize: make a token's weights sum to 1. None: for K > 1, since at K = 1 the weight would be the constant 1
            and the router would get no gradient.

    Source: AdaMoE (2406.13233), sections 3.2 and 3.3; ``identity`` is the zero-computation expert of LongCat-Flash
    (2509.01322). Differs: AdaMoE has no K = 1; LongCat-Flash does not renormalise.
    """

    def __init__(
        self, num_experts: int, *, nulls: int | None = None, kind: str = "zero", renormalize: bool | None = None
    ):
        super().__init__(num_experts, renormalize=renormalize)
        self.nulls = num_experts if nulls is None else nulls
        require(self.nulls >= 0, f"nulls={nulls} is impossible; give a whole number of at least 0.")
        require(kind in KINDS, f"kind={kind!r} is unknown; choose 'zero' or 'identity'.")
        self.identity = kind == "identity"

    def forward(self, call: Call, scores: Scores) -> Routing:
        """Choose the rows."""
        num_tokens, num_all = scores.choice_TE.shape
        expert_N = scores.choice_TE.topk(call.k, dim=-1).indices.reshape(-1)
        token_N = torch.arange(num_tokens, device=expert_N.device).repeat_interleave(call.k)
        expert_N = unmasked(call, token_N, expert_N, num_all)
        return pack(scores, token_N, expert_N, self.weigh(call, scores, token_N, expert_N))

    def planned_rows(self, num_experts: int, k: int) -> float:
        """K E/(E+m), the true rows of even loads."""
        return k * num_experts / (num_experts + self.nulls)

    def weigh(
        self, call: Call, scores: Scores, token_N: Int[Tensor, " N"], expert_N: Int[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """The gates of true rows, of identity nulls too; those of other nulls are 0."""
        if not self.identity:
            expert_N = expert_N.masked_fill(expert_N >= call.num_experts, scores.gate_TE.shape[1])
        weight_N = weigh(scores, token_N, expert_N, False)
        if not (call.k > 1 if self.renormalize is None else self.renormalize):
            return weight_N
        total_T = weight_N.new_zeros(len(scores.gate_TE)).index_add(0, token_N, weight_N)
        return weight_N / total_T.gather(0, token_N).clamp(min=1e-30)  # beside a null, true gates may be very small
