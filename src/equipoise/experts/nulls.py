"""Null experts that answer with the token itself."""

from jaxtyping import Float
from torch import Tensor

from equipoise.contracts import Routing


def identity(x: Float[Tensor, "*batch D"], routing: Routing, num_experts: int) -> Float[Tensor, "*batch D"]:
    """What zero-computation experts add: each token times the sum of its null rows' weights.

    Args:
        x: the tokens.
        routing: null experts have the ids from ``num_experts`` on, which counts the true ones.
    """
    weight_N = routing.weight_N.masked_fill(routing.expert_N < num_experts, 0)  # rows without use weigh 0 already
    weight_T = weight_N.new_zeros(x.shape[:-1].numel()).index_add(0, routing.token_N, weight_N)
    return x * weight_T.view(*x.shape[:-1], 1).to(x.dtype)
