"""Token choice: every token takes its K best experts, dropless or within a capacity."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require
from equipoise.routing.rows import pack, unmasked, weigh
from equipoise.routing.selector import Selector


class TopK(Selector):
    """Choose the K experts of highest ``choice`` per token; N = T*K rows.

    With ``groups``, experts lie in groups of E / groups neighbours (the experts of a node, say), and a token may take
    experts of ``kept_groups`` of them only: those in which its K / kept_groups highest ``choice`` add up to most.

    Args:
        num_experts: E.
        renormalize: make a token's weights sum to 1. None: for K > 1, since at K = 1 the weight would be the constant 1
            and the router would get no gradient.
        capacity_factor: an expert keeps at most ``ceil(factor * tokens * K / E)`` rows in training; None drops nothing.
        drop: which rows an expert over its capacity keeps: those of the highest gate (``"score"``) or of the first
            tokens (``"position"``).
        groups: the groups that experts lie in; 1 is no limit.
        kept_groups: the groups that a token may take experts of; the default of 1 is the strictest limit there is.
        scale: what every weight is multiplied by, after it was renormalised.

    Fails: UserError for groups that do not fit E or K, and where ``renormalize`` is asked for with K = 1.
    Source: GShard (2006.16668), algorithm 1; Switch (2101.03961), section 2.2 for the capacity; DeepSeek-V3
    (2412.19437), section 2.1.2 for the groups (its nodes), and its released configuration for the scale.
    Differs: dropping is off in evaluation, and a dropped row's weight is not given to the token's other experts.

    Attributes:
        looks_ahead: True with a capacity, since later tokens may push a token out of its expert.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        renormalize: bool | None = None,
        capacity_factor: float | None = None,
        drop: str = "score",
        groups: int = 1,
        kept_groups: int = 1,
        scale: float = 1.0,
    ):
        super().__init__(num_experts, renormalize=renormalize)
        require(drop in ("score", "position"), f"drop={drop!r} is unknown; choose 'score' or 'position'.")
        kept = capacity_factor is None or 0 < capacity_factor < math.inf
        require(kept, f"capacity_factor={capacity_factor} is no factor; give a positive number, or None.")
        require(groups >= 1 and num_experts % groups == 0, f"groups={groups} must divide the {num_experts} experts.")
        require(
            1 <= kept_groups <= groups,
            f"kept_groups={kept_groups} must lie between 1 and groups={groups}; raise groups.",
        )
        require(0 < scale < math.inf, f"scale={scale} is no factor; give a positive number.")
        self.capacity_factor, self.drop = capacity_factor, drop
        self.looks_ahead = capacity_factor is not None
        self.groups, self.kept_groups, self.scale = groups, kept_groups, scale

    def forward(self, call: Call, scores: Scores) -> Routing:
        """Choose the rows."""
        num_tokens, num_experts = scores.choice_TE.shape
        expert_N = self._open(scores.choice_TE.detach(), call.k).topk(call.k, dim=-1).indices.reshape(-1)
        token_N = torch.arange(num_tokens, device=expert_N.device).repeat_interleave(call.k)
        expert_N = unmasked(call, token_N, expert_N, num_experts)
        weight_N = self.weigh(call, scores, token_N, expert_N)
        if self.capacity_factor is None or not call.training:
            return pack(scores, token_N, expert_N, weight_N)
        over_N = self._over_capacity(call, num_experts, expert_N, weigh(scores, token_N, expert_N, False).detach())
        count = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_N.device)
        dropped_E = count.scatter_add(0, expert_N, over_N.to(torch.int64))[:num_experts]
        expert_N = expert_N.masked_fill(over_N, num_experts)
        return pack(scores, token_N, expert_N, weight_N.masked_fill(over_N, 0), dropped_E)

    def refuse(self, k: int) -> None:
        """Fails: UserError where these settings make no sense with K experts per token."""
        super().refuse(k)
        each = self.num_experts // self.groups
        require(
            k % self.kept_groups == 0 and k <= self.kept_groups * each,
            f"kept_groups={self.kept_groups} does not fit top_k={k}: it must divide top_k, and its groups of {each} "
            "experts must hold top_k; change groups, kept_groups or top_k.",
        )

    def weigh(
        self, call: Call, scores: Scores, token_N: Int[Tensor, " N"], expert_N: Int[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """The combine weights of rows chosen by anyone, read from the live gate and scaled."""
        return super().weigh(call, scores, token_N, expert_N) * self.scale

    def _open(self, choice_TE: Float[Tensor, "T E"], k: int) -> Float[Tensor, "T E"]:
        """The choice, with -inf for the experts of groups that the token does not keep."""
        if self.kept_groups == self.groups:
            return choice_TE
        choice_TGE = choice_TE.unflatten(1, (self.groups, -1))
        score_TG = choice_TGE.topk(k // self.kept_groups, dim=-1).values.sum(-1)
        shut_TG = torch.ones_like(score_TG, dtype=torch.bool)
        shut_TG = shut_TG.scatter(1, score_TG.topk(self.kept_groups, dim=-1).indices, False)
        return choice_TGE.masked_fill(shut_TG[..., None], -torch.inf).flatten(1)

    def _over_capacity(
        self, call: Call, num_experts: int, expert_N: Int[Tensor, " N"], gate_N: Float[Tensor, " N"]
    ) -> Tensor:
        """True for the rows that find their expert full."""
        assert self.capacity_factor is not None
        share = self.capacity_factor * call.tokens().double() * call.k / num_experts
        capacity = (share - 1e-9).ceil()  # 1.2 times 40 is 48, and not the hair above it that floats make of it
        order_N = (
            gate_N.argsort(descending=True, stable=True)
            if self.drop == "score"
            else torch.arange(len(expert_N), device=expert_N.device)
        )
        order_N = order_N[expert_N[order_N].argsort(stable=True)]
        sorted_N = expert_N[order_N]
        rank_N = torch.arange(len(expert_N), device=expert_N.device) - torch.searchsorted(sorted_N, sorted_N)
        over_N = (rank_N >= capacity) & (sorted_N < num_experts)
        return torch.empty_like(over_N).scatter(0, order_N, over_N)
