"""The router: tokens to logits, one linear map in at least fp32."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Router(nn.Module):
    """``logit = x weight^T``, computed in fp32 under any autocast (fp64 for fp64 tokens), whatever dtype it is kept in.

    Args:
        dim: D, width of the model.
        num_experts: E.
    """

    def __init__(self, dim: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim).normal_(std=dim**-0.5))

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """The logits of every token for every expert."""
        return multiply(x_TD, self.weight)


def multiply(x_TD: Float[Tensor, "T D"], weight_ED: Float[Tensor, "E D"]) -> Float[Tensor, "T E"]:
    """``x weight^T`` in fp32 under any autocast, or in the tokens' dtype where that is more precise."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    kind = "cpu" if x_TD.device.type == "meta" else x_TD.device.type  # autocast does not know meta tensors
    with torch.autocast(kind, enabled=False):
        return F.linear(x_TD.to(dtype), weight_ED.to(dtype))
