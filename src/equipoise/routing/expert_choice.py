"""Expert choice: every expert takes its best tokens, so the load is equal by construction."""

import torch
from jaxtyping import Int
from torch import Tensor

from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import UserError, require
from equipoise.routing.denoising import SCHEDULES, experts_by_ratio
from equipoise.routing.rows import pack
from equipoise.routing.selector import Selector
from equipoise.routing.top_k import TopK

EVALUATIONS = ("refuse", "top_k", "as_trained")
PER = ("call", "sequence")
SIGMA = 0.22  # at which the Gaussian's mean K is that of the other schedules


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
        per: which tokens compete: those of the whole ``"call"``, or those of each ``"sequence"`` (EC-DLM).
        schedule: K by the share of masked tokens of a sequence, inside ``equipoise.denoising``; elsewhere K is the
            layer's. See ``denoising.experts_by_ratio``.
        k_min: least K of the schedule.
        k_max: largest K of the schedule.
        sigma: width of the Gaussian schedules, at least 0.001 and below 1000.

    Source: Zhou et al. 2022 (2202.09368), section 3.2, pooled over the call; with ``per="sequence"`` EC-DLM
    (2604.01622), as its authors' code has it. Differs: no, with ``renormalize=False``; EC-DLM ranks logits, we rank
    ``choice``. INFERRED: padding is not in the pool.
    """

    causal = False
    looks_ahead = True

    def __init__(
        self,
        num_experts: int,
        *,
        renormalize: bool = False,
        evaluation: str = "refuse",
        per: str = "call",
        schedule: str | None = None,
        k_min: int | None = None,
        k_max: int | None = None,
        sigma: float = SIGMA,
    ):
        super().__init__(num_experts, renormalize=renormalize)
        known = ", ".join(EVALUATIONS)
        require(evaluation in EVALUATIONS, f"evaluation={evaluation!r} is unknown; choose one of {known}.")
        require(per in PER, f"per={per!r} is unknown; choose 'call' or 'sequence'.")
        self.evaluation, self.per = evaluation, per
        self.schedule = _schedule(schedule, k_min, k_max, sigma, per)
        self.token_choice = TopK(num_experts, renormalize=None if renormalize else False)

    def refuse(self, k: int) -> None:
        """Any K will do: it says how many tokens an expert takes on average, not how many experts a token has.

        Fails: UserError where a schedule asks for more experts than there are.
        """
        largest = self._largest(1)
        require(largest <= self.num_experts, f"k_max={largest} must be at most num_experts={self.num_experts}.")

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
        pools = 1 if self.per == "call" else call.num_sequences
        choice_BES = scores.choice_TE.detach().view(pools, num_tokens // max(1, pools), num_experts).transpose(1, 2)
        if call.mask_T is not None:
            choice_BES = choice_BES.masked_fill(~call.mask_T.view(pools, 1, num_tokens // max(1, pools)), -torch.inf)
        size = choice_BES.shape[2]
        capacity = _capacity(size, self._largest(call.k), num_experts)
        position_BEC, order_BEC = choice_BES.topk(capacity, dim=-1).indices.sort(dim=-1)
        unused_BEC = order_BEC >= self._kept(call, pools, size, num_experts)[:, None, None]
        token_BEC = position_BEC + size * torch.arange(pools, device=position_BEC.device)[:, None, None]
        expert_BEC = torch.arange(num_experts, device=position_BEC.device)[:, None].expand_as(token_BEC)
        expert_N = expert_BEC.masked_fill(unused_BEC, num_experts).transpose(0, 1).reshape(-1)
        token_N = token_BEC.transpose(0, 1).reshape(-1)
        return pack(scores, token_N, expert_N, self.weigh(call, scores, token_N, expert_N))

    def num_rows(self, num_tokens: int, num_experts: int, k: int) -> int:
        """N = E*C of one pool of tokens, with the capacity that it would have without padding."""
        return num_experts * _capacity(num_tokens, self._largest(k), num_experts)

    def rows_of(self, call: Call, num_experts: int) -> int:
        """N over all pools."""
        pools = 1 if self.per == "call" else call.num_sequences
        return pools * self.num_rows(call.x_TD.shape[0] // max(1, pools), num_experts, call.k)

    def _largest(self, k: int) -> int:
        """The largest K that a call can have."""
        return k if self.schedule is None else max(k, self.schedule[2])

    def _kept(self, call: Call, pools: int, size: int, num_experts: int) -> Int[Tensor, " B"]:
        """The tokens that each expert takes of each pool."""
        real_BS = torch.ones_like(call.sequence_T) if call.mask_T is None else call.mask_T.to(torch.int64)
        tokens_B = real_BS.view(pools, size).sum(1)
        k_B = torch.full_like(tokens_B, call.k)
        if self.schedule is not None and call.ratio_B is not None:
            k_B = experts_by_ratio(call.ratio_B, *self.schedule)
        return torch.minimum(tokens_B, (tokens_B * k_B // num_experts).clamp(min=1))


def _capacity(num_tokens: int, k: int, num_experts: int) -> int:
    """C without padding."""
    return min(num_tokens, max(1, num_tokens * k // num_experts))


def _schedule(
    schedule: str | None, k_min: int | None, k_max: int | None, sigma: float, per: str
) -> tuple[str, int, int, float] | None:
    """What ``experts_by_ratio`` wants to know; None where K is constant."""
    gaussian = schedule is not None and schedule.startswith("gaussian")
    require(gaussian or sigma == SIGMA, f"sigma is for the Gaussian schedules; leave it out, not sigma={sigma}.")
    if schedule is None:
        require(k_min is None and k_max is None, "k_min and k_max are for a schedule; give one, or leave them out.")
        return None
    require(schedule in SCHEDULES, f"schedule={schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}.")
    if k_min is None or k_max is None or not 1 <= k_min <= k_max:
        raise UserError(f"A schedule needs 1 <= k_min <= k_max, not k_min={k_min} and k_max={k_max}.")
    require(per == "sequence", "A schedule gives every sequence its own K; give per='sequence' with it.")
    require(1e-3 <= sigma < 1e3, f"sigma={sigma} is no width of a bell over [0, 1]; give 0.001 or more, below 1000.")
    return schedule, k_min, k_max, sigma
