"""torch's grouped matrix product: one call for all experts, and no wait for the device."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(dtype: torch.dtype, widths: tuple[int, ...]) -> str | None:
    """Why rows of these widths cannot be multiplied here, or None."""
    if dtype not in DTYPES:
        return f"torch's grouped_mm does not take {str(dtype).removeprefix('torch.')}"
    if any(width * dtype.itemsize % 16 for width in widths):
        return f"torch's grouped_mm takes rows of a multiple of 16 bytes, not widths {widths} in {dtype}"
    return None


def linear(x_NI: Float[Tensor, "N I"], weight_EOI: Float[Tensor, "E O I"], end_E: Int[Tensor, " E"]) -> Tensor:
    """Multiply every row with its expert's weight: ``[N, O]``; rows after the last expert's end are zero."""
    if 1 not in weight_EOI.stride()[1:]:
        weight_EOI = weight_EOI.contiguous()  # torch takes each expert's matrix by rows or by columns, not strided
    y_NO = F.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=end_E.to(torch.int32))
    # torch leaves the rows after the end undefined on CUDA; on the CPU, where looking is free, there are often none.
    if y_NO.is_cuda or int(end_E[-1]) < y_NO.shape[0]:
        unused_N = torch.arange(y_NO.shape[0], device=y_NO.device) >= end_E[-1]
        y_NO.masked_fill_(unused_N[:, None], 0)
    return y_NO


def outer(y_NO: Float[Tensor, "N O"], x_NI: Float[Tensor, "N I"], end_E: Int[Tensor, " E"]) -> Tensor:
    """Sum the outer products of each expert's rows: ``[E, O, I]``; zero for an expert without rows."""
    return F.grouped_mm(y_NO.T, x_NI, offs=end_E.to(torch.int32))
