"""The load-balancing loss ``E * sum_i f_i P_i``, f counted per sequence, micro-batch or global batch."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancing.balancer import Balancer
from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require

SCOPES = ("micro", "global", "sequence")
FREQUENCIES = ("actual", "unbiased")


class BalanceLoss(Balancer):
    """``E * sum_i f_i P_i``: 1 when balanced, for any E and K; f_i = share of selected rows, P_i = mean probability.

    Args:
        num_experts: E.
        scope: what f is counted over. ``"micro"``: this micro-batch on this rank. ``"global"``: the optimizer step's
            micro-batches so far on all ranks, so that f is exact at the last micro-batch and a running estimate before.
            ``"sequence"``: each sequence by itself, as is P; the loss is the mean over the sequences that have tokens.
        weight: of the loss.
        frequency: of which experts f is the share. ``"actual"``: those that were routed to. ``"unbiased"``, for
            sequences only: the K experts of highest gate, which no bias and no limit to groups has touched.

    Fails: UserError for an unknown scope or frequency, or an unbiased frequency of another scope.
    Source: ``micro``: Switch (2101.03961), eq. 4 to 6. ``global``: Qiu et al. 2025 (2501.11873), with its buffer over
    micro-batches. ``sequence``: DeepSeek-V3 (2412.19437), eq. 17 to 20, whose f is the unbiased one. Differs: f has the
    factor 1/K, so that balance reads 1 for any K; an actual f of sequences leaves out rows that a capacity dropped.
    """

    def __init__(self, num_experts: int, *, scope: str = "global", weight: float = 1e-2, frequency: str = "actual"):
        super().__init__()
        require(scope in SCOPES, f"balance_loss.scope={scope!r} is unknown; choose one of {', '.join(SCOPES)}.")
        require(0 <= weight < math.inf, f"balance_loss.weight={weight} is no weight; give a number of at least 0.")
        known = ", ".join(FREQUENCIES)
        require(frequency in FREQUENCIES, f"balance_loss.frequency={frequency!r} is unknown; choose one of {known}.")
        require(
            frequency == "actual" or scope == "sequence",
            f"balance_loss.frequency={frequency!r} is for scope='sequence'; leave it out for {scope!r}.",
        )
        self.scope, self.weight, self.frequency = scope, weight, frequency

    @property
    def needs_all_ranks(self) -> bool:
        """True for the global scope."""
        return self.scope == "global"

    def loss(self, call: Call, scores: Scores, routing: Routing) -> Tensor:
        """The scalar loss; ``P_E`` for ``global``."""
        if self.scope == "sequence":
            return _mean_over_sequences(call, scores, *self._chosen(call, scores, routing))
        prob_E = call.mean(scores.prob_TE)
        return prob_E if self.scope == "global" else (_slope(routing.demand_E(), prob_E) * prob_E).sum()

    def slope(self, carrier: Tensor, demand_E: Int[Tensor, " E"]) -> Tensor:
        """``E * f`` for ``global``."""
        return _slope(demand_E, carrier) if self.scope == "global" else super().slope(carrier, demand_E)

    def _chosen(self, call: Call, scores: Scores, routing: Routing) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
        """Tokens and experts of the rows that f counts; E is the expert of those it does not."""
        if self.frequency == "actual":
            return routing.token_N, routing.expert_N
        expert_TK = scores.gate_TE.detach().topk(call.k, dim=-1).indices
        if call.mask_T is not None:
            expert_TK = expert_TK.masked_fill(~call.mask_T[:, None], scores.gate_TE.shape[1])
        token_N = torch.arange(len(expert_TK), device=expert_TK.device).repeat_interleave(call.k)
        return token_N, expert_TK.reshape(-1)


def _slope(demand_E: Int[Tensor, "*B E"], like: Tensor) -> Float[Tensor, "*B E"]:
    """``E * f_E``."""
    total = demand_E.sum(-1, keepdim=True).clamp(min=1).to(like.dtype)
    return demand_E.to(like.dtype) * (demand_E.shape[-1] / total)


def _mean_over_sequences(
    call: Call, scores: Scores, token_N: Int[Tensor, " N"], expert_N: Int[Tensor, " N"]
) -> Float[Tensor, ""]:
    """The mean of the sequences' losses; 0 without tokens."""
    num_experts, num_sequences = scores.prob_TE.shape[1], call.num_sequences
    real_T = torch.ones_like(call.sequence_T) if call.mask_T is None else call.mask_T.to(torch.int64)
    tokens_B = real_T.new_zeros(num_sequences).index_add(0, call.sequence_T, real_T)
    place_N = call.sequence_T.gather(0, token_N) * (num_experts + 1) + expert_N
    count = place_N.new_zeros(num_sequences * (num_experts + 1)).scatter_add(0, place_N, torch.ones_like(place_N))
    slope_BE = _slope(count.view(num_sequences, num_experts + 1)[:, :-1], scores.prob_TE)
    value_T = (slope_BE.index_select(0, call.sequence_T) * scores.prob_TE).sum(-1)
    share_T = real_T.to(value_T.dtype) / tokens_B.clamp(min=1).gather(0, call.sequence_T)
    return (value_T * share_T).sum() / (tokens_B > 0).sum().clamp(min=1)
