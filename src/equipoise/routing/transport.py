"""Balanced transport between tokens and experts, by Sinkhorn's iteration in the log domain."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Converged = Callable[[Tensor, Tensor], Tensor]


def sinkhorn(
    score_TE: Float[Tensor, "T E"],
    mask_T: Bool[Tensor, " T"] | None,
    iterations: int,
    converged: Converged,
    rows_first: bool = False,
) -> tuple[Float[Tensor, " T"], Float[Tensor, " E"]]:
    """Potentials f and g of the plan ``exp(score + f + g)``: rows of real tokens sum to 1, columns nearly to tokens/E.

    An iteration fits the columns, then the rows, so that rows are exact. It stops early where nobody has to wait for
    the answer; elsewhere the potentials stand still from there on, so the answer is the same.

    Args:
        score_TE: the negative cost over the regularisation.
        mask_T: False for padding, whose rows of the plan are 0.
        iterations: at most.
        converged: from the columns' potentials before and after an iteration to a 0-d bool.
        rows_first: fit the rows once before.
    """
    num_tokens, num_experts = score_TE.shape
    tokens = score_TE.new_full((), num_tokens) if mask_T is None else mask_T.sum().to(score_TE.dtype)
    column = tokens.clamp(min=1).log() - math.log(num_experts)
    g_E = score_TE.new_zeros(num_experts)
    f_T = _without_padding(-score_TE.logsumexp(1) if rows_first else score_TE.new_zeros(num_tokens), mask_T)
    done = torch.zeros((), dtype=torch.bool, device=score_TE.device)
    for _ in range(iterations):
        next_E = column - (score_TE + f_T[:, None]).logsumexp(0)
        next_T = _without_padding(-(score_TE + next_E).logsumexp(1), mask_T)
        stop = converged(g_E, next_E)
        f_T, g_E = torch.where(done, f_T, next_T), torch.where(done, g_E, next_E)
        done = done | stop
        if costs_no_wait(done) and done:
            break
    return f_T, g_E


def costs_no_wait(value: Tensor) -> bool:
    """Whether one may look at the value: no device is waited for, and no graph that is being compiled is broken."""
    return not torch.compiler.is_compiling() and type(value) is Tensor and value.is_cpu


def _without_padding(f_T: Float[Tensor, " T"], mask_T: Bool[Tensor, " T"] | None) -> Float[Tensor, " T"]:
    """Potentials that keep padding out of the plan; finite, so that a call of padding alone makes no NaN."""
    return f_T if mask_T is None else f_T.masked_fill(~mask_T, torch.finfo(f_T.dtype).min / 4)
