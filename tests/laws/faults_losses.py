"""Faults of expert choice, ERC, Sigma-MoE-Tiny, AdaMoE, token rounding and noisy top-k gating."""

from dataclasses import replace

import torch

from equipoise.balancing.balance_loss import BalanceLoss
from equipoise.balancing.erc import Erc
from equipoise.balancing.importance_load import ImportanceLoad
from equipoise.balancing.top1_loss import Top1Loss
from equipoise.routing.expert_choice import ExpertChoice
from equipoise.routing.token_rounding import TokenRounding
from laws.fault import Fault, breaking


class DrawsFromTheStream(Erc):
    """Noise of torch's own generator, which recomputation finds elsewhere."""

    def blur(self, router_ED, step):
        return 1 + 0.1 * torch.rand_like(router_ED)


class DetachesConfidence(Top1Loss):
    """The denominator is a constant, so flat probabilities pay again."""

    def loss(self, call, scores, routing):
        prob_TE = (scores.logit_TE / self.tau).softmax(-1)
        chosen = call.mean(prob_TE.topk(call.k, dim=-1).values.sum(-1)).detach()
        return prob_TE.shape[1] * call.mean(prob_TE).square().sum() / chosen


class BalancesEveryNull(BalanceLoss):
    """Null experts are balanced among themselves."""


class ChoosesPadding(ExpertChoice):
    """Padding is among the tokens that experts choose from, and in their capacity."""

    def forward(self, call, scores):
        return super().forward(replace(call, mask_T=None), scores)


class RoundsPadding(TokenRounding):
    """Padding chooses experts too."""

    def forward(self, call, scores):
        return super().forward(replace(call, mask_T=None), scores)


class ExpectsPadding(ImportanceLoad):
    """Padding is in the expected load."""

    def loss(self, call, scores, routing):
        return super().loss(replace(call, mask_T=None), scores, routing)


FAULTS = {
    "experts choose padding": Fault(
        "test_padding.test_padding_changes_nothing",
        breaking(selector=ChoosesPadding),
        {"method": "expert_choice", "fill": 0.0},
    ),
    "noise is drawn from a stream": Fault(
        "test_counting.test_what_wraps_a_layer_changes_nothing",
        breaking(erc=DrawsFromTheStream),
        {"method": "erc", "wrap": "non_reentrant"},
    ),
    "confidence is a constant": Fault(
        "test_losses.test_losses_reach_the_router_as_written",
        breaking(top1_loss=DetachesConfidence),
        {"method": "sigma_tiny"},
    ),
    "null experts are balanced one by one": Fault(
        "test_losses.test_losses_reach_the_router_as_written",
        breaking(null_loss=BalancesEveryNull),
        {"method": "adamoe"},
    ),
    "padding is rounded": Fault(
        "test_padding.test_padding_changes_nothing",
        breaking(selector=RoundsPadding),
        {"method": "token_rounding", "fill": 0.0},
    ),
    "padding is in the expected load": Fault(
        "test_padding.test_padding_changes_nothing",
        breaking(importance_load=ExpectsPadding),
        {"method": "importance_load", "fill": 0.0},
    ),
}
