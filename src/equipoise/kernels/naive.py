"""The oracle: one row at a time, in plain loops. Every other kernel is compared with this one."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def linear(x_NI: Float[Tensor, "N I"], weight_EOI: Float[Tensor, "E O I"], end_E: Int[Tensor, " E"]) -> Tensor:
    """Multiply every row with its expert's weight: ``[N, O]``; rows after the last expert's end are zero."""
    y_NO = x_NI.new_zeros(x_NI.shape[0], weight_EOI.shape[1])
    for row, expert in enumerate(_experts(end_E)):
        y_NO[row] = weight_EOI[expert] @ x_NI[row]
    return y_NO


def outer(y_NO: Float[Tensor, "N O"], x_NI: Float[Tensor, "N I"], end_E: Int[Tensor, " E"]) -> Tensor:
    """Sum the outer products of each expert's rows: ``[E, O, I]``; zero for an expert without rows."""
    weight_EOI = x_NI.new_zeros(end_E.shape[0], y_NO.shape[1], x_NI.shape[1])
    for row, expert in enumerate(_experts(end_E)):
        weight_EOI[expert] += torch.outer(y_NO[row], x_NI[row])
    return weight_EOI


def _experts(end_E: Tensor) -> list[int]:
    """The expert of each dispatched row."""
    starts = [0, *end_E.tolist()[:-1]]
    return [expert for expert, (start, end) in enumerate(zip(starts, end_E.tolist())) for _ in range(start, end)]
