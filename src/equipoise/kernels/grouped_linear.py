"""One differentiable operator in front of every kernel: eager, compiled, on meta tensors, in any dtype and size.

torch's own grouped_mm knows neither fp64, odd sizes nor fp32 under ``torch.compile``; behind a custom operator all of
them take the same road, and the compiler sees one opaque node with known shapes.
"""

from typing import Any

import torch
from torch import Tensor

from equipoise.kernels import KERNELS


@torch.library.custom_op("equipoise::grouped_linear", mutates_args=())
def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, end_E: Tensor, kernel: str) -> Tensor:
    """Multiply each row with its expert's weight.

    Args:
        x_NI: rows sorted by expert, ``[N, I]``.
        weight_EOI: ``[E, O, I]``, of the rows' dtype.
        end_E: one past each expert's last row, int64 ``[E]``; later rows belong to no expert.
        kernel: a key of ``KERNELS``.
    Returns:
        ``[N, O]``; rows of no expert are zero.
    """
    return KERNELS[kernel].linear(x_NI, weight_EOI, end_E)


@torch.library.custom_op("equipoise::grouped_outer", mutates_args=())
def grouped_outer(y_NO: Tensor, x_NI: Tensor, end_E: Tensor, kernel: str) -> Tensor:
    """Sum each expert's outer products of rows: ``[E, O, I]``, the weight's gradient of ``grouped_linear``."""
    return KERNELS[kernel].outer(y_NO, x_NI, end_E)


@grouped_linear.register_fake
def _(x_NI: Tensor, weight_EOI: Tensor, end_E: Tensor, kernel: str) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_EOI.shape[1])


@grouped_outer.register_fake
def _(y_NO: Tensor, x_NI: Tensor, end_E: Tensor, kernel: str) -> Tensor:
    return x_NI.new_empty(end_E.shape[0], y_NO.shape[1], x_NI.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_NI, weight_EOI, end_E, ctx.kernel = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x_NI if needs_weight else None, weight_EOI if needs_x else None, end_E)


def _backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x_NI, weight_EOI, end_E = ctx.saved_tensors
    grad_NO = grad_NO.contiguous()  # an expanded gradient, as of y.sum(), has stride 0, which grouped_mm refuses
    grad_x = None if weight_EOI is None else grouped_linear(grad_NO, weight_EOI.transpose(1, 2), end_E, ctx.kernel)
    grad_weight = None if x_NI is None else grouped_outer(grad_NO, x_NI, end_E, ctx.kernel)
    return grad_x, grad_weight, None, None


grouped_linear.register_autograd(_backward, setup_context=_save)
