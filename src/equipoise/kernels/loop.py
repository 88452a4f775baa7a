"""One matrix product per expert: any dtype and any size, at the price of reading the loads on the host."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def linear(x_NI: Float[Tensor, "N I"], weight_EOI: Float[Tensor, "E O I"], end_E: Int[Tensor, " E"]) -> Tensor:
    """Multiply every row with its expert's weight: ``[N, O]``; rows after the last expert's end are zero."""
    y_NO = x_NI.new_empty(x_NI.shape[0], weight_EOI.shape[1])
    start = 0
    for weight_OI, end in zip(weight_EOI.unbind(), end_E.tolist()):
        torch.mm(x_NI[start:end], weight_OI.T, out=y_NO[start:end])
        start = end
    y_NO[start:] = 0
    return y_NO


def outer(y_NO: Float[Tensor, "N O"], x_NI: Float[Tensor, "N I"], end_E: Int[Tensor, " E"]) -> Tensor:
    """Sum the outer products of each expert's rows: ``[E, O, I]``; zero for an expert without rows."""
    weight_EOI = x_NI.new_empty(end_E.shape[0], y_NO.shape[1], x_NI.shape[1])
    start = 0
    for weight_OI, end in zip(weight_EOI.unbind(), end_E.tolist()):
        torch.mm(y_NO[start:end].T, x_NI[start:end], out=weight_OI)
        start = end
    return weight_EOI
