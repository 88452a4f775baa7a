"""ReMoE's selection: every token takes every expert that is active for it."""

import torch

from equipoise.contracts import Call, Routing, Scores
from equipoise.routing.rows import pack, unmasked
from equipoise.routing.selector import Selector


class Active(Selector):
    """Choose every expert of positive ``choice``; the weight is the gate itself. N = T*E rows, most of them unused.

    A token may have any number of experts, also none; K is the number that a balancer steers their mean to.

    Args:
        num_experts: E.

    Source: ReMoE (2412.14711) and its authors' code. Differs: no.
    """

    def __init__(self, num_experts: int):
        super().__init__(num_experts, renormalize=False)

    def forward(self, call: Call, scores: Scores) -> Routing:
        """Choose the rows."""
        num_tokens, num_experts = scores.choice_TE.shape
        device = scores.choice_TE.device
        token_N = torch.arange(num_tokens, device=device).repeat_interleave(num_experts)
        expert_TE = torch.arange(num_experts, device=device).expand(num_tokens, num_experts)
        expert_N = expert_TE.masked_fill(scores.choice_TE <= 0, num_experts).reshape(-1)
        expert_N = unmasked(call, token_N, expert_N, num_experts)
        return pack(scores, token_N, expert_N, self.weigh(call, scores, token_N, expert_N))

    def num_rows(self, num_tokens: int, num_experts: int, k: int) -> int:
        """N = T*E: each token may take each expert."""
        return num_tokens * num_experts
