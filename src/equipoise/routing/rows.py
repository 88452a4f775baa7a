"""From chosen (token, expert) pairs to a Routing: the weights, the order of the rows, the counts."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.contracts import Call, Routing, Scores


def weigh(
    scores: Scores, token_N: Int[Tensor, " N"], expert_N: Int[Tensor, " N"], renormalize: bool
) -> Float[Tensor, " N"]:
    """Read the combine weights of chosen rows from the unbiased gate; rows with expert id E weigh 0.

    Args:
        renormalize: divide by the sum over the token's rows, so that its weights sum to 1.
    """
    num_tokens, num_experts = scores.gate_TE.shape
    index_N = token_N * num_experts + expert_N.clamp(max=num_experts - 1)
    weight_N = scores.gate_TE.reshape(-1).gather(0, index_N).masked_fill(expert_N == num_experts, 0)
    if renormalize:
        total_T = weight_N.new_zeros(num_tokens).index_add(0, token_N, weight_N)
        weight_N = weight_N / (total_T.gather(0, token_N) + 1e-20)
    return weight_N


def pack(
    scores: Scores,
    token_N: Int[Tensor, " N"],
    expert_N: Int[Tensor, " N"],
    weight_N: Float[Tensor, " N"],
    dropped_E: Int[Tensor, " E"] | None = None,
) -> Routing:
    """Sort rows by expert, then token, those without use (expert id E) last, and count them.

    Args:
        token_N: tokens in ascending order within each expert.
        dropped_E: rows that were selected, but not kept; none by default.
    """
    num_experts = scores.gate_TE.shape[1]
    key_N = expert_N.to(torch.int16) if num_experts < 2**15 else expert_N  # short keys sort three times as fast
    order_N = key_N.argsort(stable=True)
    count = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_N.device)
    load_E = count.scatter_add(0, expert_N, torch.ones_like(expert_N))[:num_experts]
    return Routing(
        token_N.index_select(0, order_N),
        expert_N.index_select(0, order_N),
        weight_N.index_select(0, order_N),
        load_E,
        torch.zeros_like(load_E) if dropped_E is None else dropped_E,
    )


def unmasked(call: Call, token_N: Int[Tensor, " N"], expert_N: Int[Tensor, " N"], unused: int) -> Int[Tensor, " N"]:
    """The experts with those of padding replaced by the id of rows without use."""
    if call.mask_T is None:
        return expert_N
    return expert_N.masked_fill(~call.mask_T.gather(0, token_N), unused)
