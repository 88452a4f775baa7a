"""The letters, and the records that every part of a layer reads and writes.

Letters: ``B`` sequences, ``S`` positions, ``T`` = B*S tokens of one call (padding included, masked), ``D`` model width,
``F`` expert hidden width, ``E`` experts, ``K`` experts per token, ``N`` routed rows (a static bound, known before the
call), ``R`` ranks. A name carries its letters as a suffix: ``x_TD`` is ``[T, D]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from equipoise.errors import UserError


class NonFiniteError(UserError):
    """A router's logits hold NaN or infinity. ``layer`` is the layer it happened in."""

    def __init__(self, layer: nn.Module):
        super().__init__(
            "The router's logits hold NaN or infinity: the weights or the input are not finite (a learning rate that "
            "is too high is the usual cause)."
        )
        self.layer = layer


@dataclass(frozen=True)
class Call:
    """One call of a layer: what any of its parts may read.

    Attributes:
        x_TD: the tokens; the rows of padding are zero.
        mask_T: True for a real token, False for padding; None when every token is real.
        sequence_T: the sequence each token belongs to.
        k: experts per token.
        step: optimizer steps so far, a 0-d int64 tensor.
        num_experts: E, without null experts.
        router: what turns tokens into logits.
        experts: the layer's routed experts.
        training: the layer is in training mode; evaluation routes every token by itself.
        num_sequences: B.
        ratio_B: the share of masked tokens of each sequence, inside ``equipoise.denoising``; else None.
    """

    x_TD: Float[Tensor, "T D"]
    mask_T: Bool[Tensor, " T"] | None
    sequence_T: Int[Tensor, " T"]
    k: int
    step: Int[Tensor, ""]
    num_experts: int
    router: nn.Module
    experts: nn.Module
    training: bool
    num_sequences: int = 1
    ratio_B: Float[Tensor, " B"] | None = None

    def tokens(self) -> Int[Tensor, ""]:
        """The number of real tokens."""
        if self.mask_T is None:
            return torch.full((), self.x_TD.shape[0], dtype=torch.int64, device=self.x_TD.device)
        return self.mask_T.sum()

    def mean(self, value_T: Float[Tensor, " T *rest"]) -> Float[Tensor, "*rest"]:
        """The mean over the real tokens; 0 where there are none."""
        if self.mask_T is not None:
            value_T = value_T.masked_fill(~self.mask_T.view(-1, *[1] * (value_T.dim() - 1)), 0)
        return value_T.sum(0) / self.tokens().clamp(min=1)


@dataclass(frozen=True)
class Scores:
    """What a scorer says of every token and expert.

    Attributes:
        logit_TE: the router's raw output, at least fp32.
        prob_TE: the scores normalised over the experts; all that losses read.
        gate_TE: what combine weights are read from.
        choice_TE: what selection ranks on; the only field a balancer may replace.
    """

    logit_TE: Float[Tensor, "T E"]
    prob_TE: Float[Tensor, "T E"]
    gate_TE: Float[Tensor, "T E"]
    choice_TE: Float[Tensor, "T E"]


@dataclass(frozen=True)
class Routing:
    """Which expert computes which token: the one record that dispatch, losses, biases and metrics read.

    The N rows are sorted by expert, then by token. The bound N is static. Ids are the true experts, then null experts,
    then one id for rows without use, whose weight is 0; only rows of true experts are dispatched. Where a method has
    null experts, E counts them here and in ``Scores``.

    Attributes:
        token_N: the row's token.
        expert_N: the row's expert; E for a row without use.
        weight_N: the weight of the expert's answer; carries the router's gradient.
        load_E: rows dispatched to each expert.
        dropped_E: rows selected for each expert, but dropped for lack of capacity.
    """

    token_N: Int[Tensor, " N"]
    expert_N: Int[Tensor, " N"]
    weight_N: Float[Tensor, " N"]
    load_E: Int[Tensor, " E"]
    dropped_E: Int[Tensor, " E"]

    def demand_E(self) -> Int[Tensor, " E"]:
        """Rows selected for each expert, before any was dropped: what balancing acts on."""
        return self.load_E + self.dropped_E

    def detach(self) -> Routing:
        """The same record without gradient."""
        return Routing(self.token_N, self.expert_N, self.weight_N.detach(), self.load_E, self.dropped_E)


@runtime_checkable
class Stateful(Protocol):
    """A part that learns from what a window of micro-batches saw."""

    def statistics(self, call: Call, scores: Scores, routing: Routing) -> dict[str, Tensor]:
        """Tensors that may be added over micro-batches and ranks."""
        ...

    def update(self, statistics: dict[str, Tensor]) -> None:
        """Move the state, once per optimizer step, by the window's sums over all micro-batches and ranks."""
        ...
