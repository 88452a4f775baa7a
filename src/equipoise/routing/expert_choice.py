"""Expert choice: every expert takes its best tokens, so the load is equal by construction."""

import torch

from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import UserError, require
from equipoise.routing.rows import pack
from equipoise.routing.selector import Selector
from equipoise.routing.top_k import TopK

EVALUATIONS = ("refuse", "top_k", "as_trained")


class ExpertChoice(Selector):
    """Every expert takes the ``floor(tokens * K / E)`` tokens of highest ``choice``, at least one; N = E*C rows.

    A token may be taken by any number of experts, also by none. Which ones depends on the other tokens of the call,
    later ones included, so a left-to-right model learns from the future while it trains.

    Args:
        num_experts: E.
        renormalize: make a token's weights sum to 1 over the experts that took it (EC-DLM); False keeps the score
            itself (Zhou et al.).
        evaluation: what evaluation does. ``"refuse"`` raises; ``"top_k"`` routes every token by itself on the same
            scores; ``"as_trained"`` lets experts choose, right only for models that see the whole sequence anyway.

    Source: Zhou et al. 2022 (2202.09368), section 3.2, pooled over the call. Differs: no, with ``renormalize=False``.
    """

    causal = False

    def __init__(self, num_experts: int, *, renormalize: bool = False, evaluation: str = "refuse"):
        super().__init__(num_experts, renormalize=renormalize)
        known = ", ".join(EVALUATIONS)
        require(evaluation in EVALUATIONS, f"evaluation={evaluation!r} is unknown; choose one of {known}.")
        self.evaluation = evaluation
        self.token_choice = TopK(num_experts, renormalize=None if renormalize else False)

    def forward(self, call: Call, scores: Scores) -> Routing:
        """Choose the rows."""
        if not call.training and self.evaluation == "refuse":
            raise UserError(
                "expert_choice looks at later tokens, so evaluating it left to right would be wrong; name a fall-back: "
                "evaluation='top_k' (--set expert_choice.evaluation=top_k) routes every token by itself, 'as_trained' "
                "is for bidirectional models."
            )
        if not call.training and self.evaluation == "top_k":
            return self.token_choice(call, scores)
        num_tokens, num_experts = scores.choice_TE.shape
        capacity = self.num_rows(num_tokens, num_experts, call.k) // num_experts
        choice_ET = scores.choice_TE.detach().T
        if call.mask_T is not None:
            choice_ET = choice_ET.masked_fill(~call.mask_T, -torch.inf)
        token_EC = choice_ET.topk(capacity, dim=-1).indices
        tokens = call.tokens()
        kept = torch.minimum(tokens, (tokens * call.k // num_experts).clamp(min=1))
        expert_E1 = torch.arange(num_experts, device=token_EC.device)[:, None]
        unused_C = torch.arange(capacity, device=token_EC.device) >= kept
        token_EC, order_EC = token_EC.sort(dim=-1)
        expert_EC = expert_E1.expand_as(token_EC).masked_fill(
            unused_C.expand_as(token_EC).gather(1, order_EC), num_experts
        )
        token_N, expert_N = token_EC.reshape(-1), expert_EC.reshape(-1)
        return pack(scores, token_N, expert_N, self.weigh(call, scores, token_N, expert_N))

    def num_rows(self, num_tokens: int, num_experts: int, k: int) -> int:
        """N = E*C, with the capacity that the call would have without padding."""
        return num_experts * min(num_tokens, max(1, num_tokens * k // num_experts))

    def refuse(self, k: int) -> None:
        """Any K will do: it says how many tokens an expert takes on average, not how many experts a token has."""
