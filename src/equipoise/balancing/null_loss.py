"""The balance loss of AdaMoE: null experts are balanced as a group, not among themselves."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from equipoise.balancing.balance_loss import BalanceLoss
from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require

SCOPES = ("micro", "global")


class NullLoss(BalanceLoss):
    """``(E+m) sum_i f_i P_i`` over E true and m null experts, with each null's f replaced by their mean; 1 is balanced.

    Null experts are all alike, so which of them a token takes does not matter, and their probabilities all get the same
    gradient.

    Args:
        num_experts: E + m.
        scope: what f is counted over: ``"micro"``, this micro-batch on this rank; ``"global"``, the optimizer step's
            micro-batches so far on all ranks.
        weight: of the loss.

    Source: AdaMoE (2406.13233), its load-balancing loss. Differs: f has the factor 1/K, so that balance reads 1 and not
    K; the mean of the nulls is taken of P, which gives the same sum; counting over all ranks is ours.
    """

    def __init__(self, num_experts: int, *, scope: str = "global", weight: float = 2e-2):
        require(scope in SCOPES, f"null_loss.scope={scope!r} is unknown; choose one of {', '.join(SCOPES)}.")
        require(0 <= weight < math.inf, f"null_loss.weight={weight} is no weight; give a number of at least 0.")
        super().__init__(num_experts, scope=scope, weight=weight)

    def loss(self, call: Call, scores: Scores, routing: Routing) -> Tensor:
        """The scalar loss for ``micro``; ``P`` with the nulls' mean for ``global``."""
        true_TE, null_Tm = scores.prob_TE.tensor_split([call.num_experts], dim=1)
        mean_T1 = null_Tm.sum(1, keepdim=True) / max(1, null_Tm.shape[1])
        return super().loss(call, replace(scores, prob_TE=torch.cat([true_TE, mean_T1.expand_as(null_Tm)], 1)), routing)
