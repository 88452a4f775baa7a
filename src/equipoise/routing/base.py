"""BASE routing: the best assignment with equal loads in training, every token by itself in evaluation."""

from dataclasses import replace

import torch
from torch import Tensor

from equipoise.contracts import Call, Routing, Scores
from equipoise.routing.assignment import assign
from equipoise.routing.selector import Selector
from equipoise.routing.top_k import TopK


class Base(Selector):
    """In training, tokens get the experts of the highest total logit where every expert gets ``T K / E`` tokens.

    Where E does not divide T K, loads are that rounded down or up. The assignment is exact, is found on the CPU,
    carries no gradient and looks at later tokens; evaluation takes the K highest. Weights are the gate itself.

    Args:
        num_experts: E.

    Source: BASE layers (Lewis et al. 2021, 2103.16716), section 3, with K = 1. Differs: K > 1 gives a token K distinct
    experts; successive shortest paths in place of the auction, which is exact only to its epsilon; one assignment per
    call and rank, without shuffling tokens over ranks.
    """

    looks_ahead = True

    def __init__(self, num_experts: int):
        super().__init__(num_experts, renormalize=False)
        self.token_choice = TopK(num_experts, renormalize=False)

    def forward(self, call: Call, scores: Scores) -> Routing:
        """Choose the rows."""
        if not call.training:
            return self.token_choice(call, scores)
        assigned_TE = _assigned(scores.logit_TE.detach(), call.mask_T, call.k)
        return self.token_choice(call, replace(scores, choice_TE=assigned_TE))


@torch.library.custom_op("equipoise::assigned", mutates_args=())
def _assigned(logit_TE: Tensor, mask_T: Tensor | None, k: int) -> Tensor:
    """1 where a real token gets an expert, else 0; a step that the compiler does not look into.

    Logits that are not finite count as 0, since nobody could refuse them on a GPU or compiled: ``logit_total`` tells.
    """
    logit_TE, device = logit_TE.cpu().nan_to_num(0, 0, 0), logit_TE.device
    assigned_TE = torch.zeros_like(logit_TE)
    real = slice(None) if mask_T is None else mask_T.cpu()
    assigned_TE[real] = torch.from_numpy(assign(logit_TE[real].numpy(), k)).to(logit_TE.dtype)
    return assigned_TE.to(device)


@_assigned.register_fake
def _(logit_TE, mask_T, k):
    return torch.empty_like(logit_TE)
