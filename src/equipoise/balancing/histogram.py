"""Quantiles that add up: integer histograms, and where their cumulative counts pass a target."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def histogram(place_TE: Float[Tensor, "T E"], counted_TE: Bool[Tensor, "T E"], bins: int) -> Int[Tensor, "E bins"]:
    """Count each column's entries by bin; integers, so that sums over micro-batches and ranks are exact.

    Args:
        place_TE: in bins from the lower edge; what lies outside is counted in the outermost bins.
        counted_TE: False leaves an entry out.
    """
    num_experts = place_TE.shape[1]
    offset_E = torch.arange(num_experts, device=place_TE.device) * bins
    index_TE = place_TE.long().clamp_(0, bins - 1).add_(offset_E)
    histogram_EB = torch.zeros(num_experts, bins, dtype=torch.int64, device=place_TE.device)
    histogram_EB.view(-1).scatter_add_(0, index_TE.reshape(-1), counted_TE.to(torch.int64).reshape(-1))
    return histogram_EB


def crossing(histogram_EB: Int[Tensor, "E bins"], target: Float[Tensor, ""]) -> Float[Tensor, " E"]:
    """Where each row's cumulative count passes ``target``, in bins, interpolated inside the crossing bin."""
    total_EB = histogram_EB.cumsum(-1)
    bin_E1 = (total_EB <= target).sum(-1, keepdim=True).clamp(max=histogram_EB.shape[1] - 1)
    count_E1 = histogram_EB.gather(1, bin_E1)
    before_E1 = total_EB.gather(1, bin_E1) - count_E1
    return (bin_E1 + ((target - before_E1) / count_E1.clamp(min=1)).clamp(0, 1)).squeeze(1).to(torch.float32)
