"""All SwiGLU experts of a layer as one differentiable operator, in front of every kernel.

torch's own grouped_mm knows neither fp64, odd sizes nor fp32 under ``torch.compile``; behind one operator all of them
take the same road, eager, compiled and on meta tensors. Being one operator it also visits memory less often: the
combine weight is applied to the F hidden units, so the D-wide answers of the rows are neither weighed nor kept for the
backward pass, whose gradient of the weight is a product of hidden units too.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.kernels import KERNELS


@torch.library.custom_op("equipoise::swiglu", mutates_args=())
def swiglu(
    x: Tensor, token_N: Tensor, weight_N: Tensor, gate_up: Tensor, down: Tensor, end_E: Tensor, kernel: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the routed rows and add up each token's weighted answers.

    Args:
        x: tokens, ``[..., D]``.
        token_N: each row's token; rows stand by expert.
        weight_N: each row's weight.
        gate_up: ``[E, 2F, D]``, the gate's rows first.
        down: ``[E, D, F]``.
        end_E: one past each expert's last row, int64; later rows are not computed.
        kernel: a key of ``KERNELS``.
    Returns:
        The answers in the shape of ``x`` (no view: FSDP hangs its hooks on a layer's output), and what the backward
        pass needs: the rows' tokens ``[N, D]``, their hidden units before ``[N, 2F]`` and after the activation,
        weighed ``[N, F]``.
    """
    multiply = KERNELS[kernel]
    x_ND = x.reshape(-1, x.shape[-1]).index_select(0, token_N)
    hidden_NG = multiply.linear(x_ND, gate_up, end_E)
    gate_NF, up_NF = hidden_NG.chunk(2, dim=-1)
    weighed_NF = F.silu(gate_NF).mul_(up_NF).mul_(weight_N[:, None])
    y = x.new_zeros(x.shape)
    y.view(-1, x.shape[-1]).index_add_(0, token_N, multiply.linear(weighed_NF, down, end_E))
    return y, x_ND, hidden_NG, weighed_NF


@torch.library.custom_op("equipoise::swiglu_backward", mutates_args=())
def swiglu_backward(
    grad: Tensor,
    saved: list[Tensor],
    token_N: Tensor,
    weight_N: Tensor,
    gate_up: Tensor,
    down: Tensor,
    end_E: Tensor,
    kernel: str,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of tokens, combine weights, ``gate_up`` and ``down``; the last two empty unless they are needed."""
    multiply = KERNELS[kernel]
    x_ND, hidden_NG, weighed_NF = saved
    gate_NF, up_NF = hidden_NG.chunk(2, dim=-1)
    grad_ND = grad.reshape(-1, grad.shape[-1]).index_select(0, token_N)
    grad_NF = multiply.linear(grad_ND, down.transpose(1, 2), end_E)
    # Fresh memory is dear, so buffers are written twice: silu's holds the gradient of the combine weight's factors too.
    silu_NF = F.silu(gate_NF)
    grad_NG = torch.empty_like(hidden_NG)
    grad_gate_NF, grad_up_NF = grad_NG.chunk(2, dim=-1)
    torch.mul(grad_NF, silu_NF, out=grad_up_NF)
    grad_weight_N = silu_NF.mul_(up_NF).mul_(grad_NF).sum(-1, dtype=weight_N.dtype)
    grad_up_NF.mul_(weight_N[:, None])
    grad_NF.mul_(up_NF).mul_(weight_N[:, None])
    torch.ops.aten.silu_backward.grad_input(grad_NF, gate_NF, grad_input=grad_gate_NF)
    grad_x_ND = multiply.linear(grad_NG, gate_up.transpose(1, 2), end_E)
    grad_x = grad.new_zeros(grad.shape)
    grad_x.view(-1, grad.shape[-1]).index_add_(0, token_N, grad_x_ND)
    if not needs_weights:
        return grad_x, grad_weight_N, gate_up.new_empty(0), down.new_empty(0)
    grad_gate_up = multiply.outer(grad_NG, x_ND, end_E)
    return grad_x, grad_weight_N, grad_gate_up, multiply.outer(grad_ND, weighed_NF, end_E)


@swiglu.register_fake
def _(x, token_N, weight_N, gate_up, down, end_E, kernel):
    widths = (x.shape[-1], gate_up.shape[1], down.shape[2])
    return x.new_empty(x.shape), *(x.new_empty(token_N.shape[0], width) for width in widths)


@swiglu_backward.register_fake
def _(grad, saved, token_N, weight_N, gate_up, down, end_E, kernel, needs_weights):
    shapes = (gate_up.shape, down.shape) if needs_weights else ((0,), (0,))
    return grad.new_empty(grad.shape), torch.empty_like(weight_N), *(gate_up.new_empty(shape) for shape in shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, token_N, weight_N, gate_up, down, end_E, ctx.kernel = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(token_N, weight_N, gate_up, down, end_E, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    token_N, weight_N, gate_up, down, end_E, *saved = ctx.saved_tensors
    needs_weights = any(ctx.needs_input_grad[3:5])
    grad_x, grad_weight_N, grad_gate_up, grad_down = swiglu_backward(
        grad, saved, token_N, weight_N, gate_up, down, end_E, ctx.kernel, needs_weights
    )
    if not needs_weights:
        return grad_x, None, grad_weight_N, None, None, None, None
    return grad_x, None, grad_weight_N, grad_gate_up, grad_down, None, None


swiglu.register_autograd(_backward, setup_context=_save)
