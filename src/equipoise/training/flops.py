"""The FLOP ledger: what a decoder's matrix products cost, part by part.

A multiply-add is 2 FLOPs, so a product costs 2 per weight and row, forward; backward costs twice that, once for the
gradient of the rows and once for that of the weight. Attention's scores and their sum over values are counted as full
S x S products, causal or not, without the recomputation of fused kernels: what ``torch.utils.flop_counter`` counts for
``F.scaled_dot_product_attention`` in its plain form (``SDPBackend.MATH``). Experts are charged the rows that they
computed: what was dropped, padding and rows without use cost nothing. Left out is element-wise work (norms, softmax,
activations, selection, combining, looking up embeddings, the optimizer) and what a balancer computes beside the layer.

Importing this module also teaches torch's counter our two operators, by the rows that experts have, not by their bound.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from equipoise.errors import UserError
from equipoise.models.decoder import Decoder


@dataclass(frozen=True)
class Flops:
    """FLOPs of each part of a decoder, summed over its layers."""

    attention: int
    router: int
    routed: int
    shared: int
    dense: int
    head: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(astuple(self))

    def __mul__(self, factor: int) -> "Flops":
        return Flops(*(part * factor for part in astuple(self)))


@dataclass(frozen=True)
class Ledger:
    """Forward FLOPs per token, and per routed row where the number of rows decides.

    Attributes:
        token: of one token, ``routed`` excepted, which is 0.
        row: of one row of each MoE layer's experts.
        plan: rows per token that each MoE layer is expected to compute, by the step they hold from.
    """

    token: Flops
    row: tuple[int, ...]
    plan: dict[int, tuple[float, ...]]

    @classmethod
    def of(cls, model: Decoder, seq_len: int) -> "Ledger":
        """Read the sizes from a model that gets sequences of S = ``seq_len``."""
        attentions = [layer.attention for layer in model.layers]
        denses = [layer.dense for layer in model.layers if layer.dense is not None]
        moes = [layer.moe for layer in model.layers if layer.moe is not None]
        token = Flops(
            attention=sum(_product(each) + 4 * seq_len * each.qkv.in_features for each in attentions),
            router=sum(_product(moe.router) for moe in moes),
            routed=0,
            shared=sum(_product(moe.shared) for moe in moes if moe.shared is not None),
            dense=sum(_product(dense) for dense in denses),
            head=_product(model.embedding),
        )
        row = tuple(_product(moe.experts) // moe.num_experts for moe in moes)
        starts = sorted({0, *(start for moe in moes for start in moe.sparsity.start)})
        plan = {
            start: tuple(moe.selector.planned_rows(moe.num_experts, moe.sparsity.at(start)) for moe in moes)
            for start in starts
        }
        return cls(token, row, plan)

    def forward_flops(self, num_tokens: int, rows_per_layer: Sequence[int]) -> Flops:
        """FLOPs of one forward pass.

        Args:
            num_tokens: T, padding included: only the experts skip it.
            rows_per_layer: the rows that each MoE layer's experts computed: ``load_E`` summed, without null experts.
        Fails: UserError where ``rows_per_layer`` does not name each MoE layer.
        """
        if len(rows_per_layer) != len(self.row):
            raise UserError(f"There are {len(self.row)} MoE layers; rows_per_layer must have as many entries.")
        routed = sum(rows * row for rows, row in zip(rows_per_layer, self.row))
        return replace(self.token * num_tokens, routed=routed)

    def step_flops(self, num_tokens: int, rows_per_layer: Sequence[int]) -> Flops:
        """FLOPs of one training step, forward and backward; arguments as for ``forward_flops``."""
        return self.forward_flops(num_tokens, rows_per_layer) * 3

    def per_token(self, step: int = 0) -> Flops:
        """FLOPs of training on one token at this step, for planning before any row is routed."""
        rows = next(self.plan[start] for start in sorted(self.plan, reverse=True) if step >= start)
        routed = round(sum(count * row for count, row in zip(rows, self.row)))
        return replace(self.token, routed=routed) * 3

    def steps(self, flops: float, tokens: int, done: int = 0) -> int:
        """How many steps the plan allows in all.

        Args:
            flops: that are left.
            tokens: of one step.
            done: steps that are behind us.
        Returns:
            ``done`` and the steps that spend ``flops``, to the nearest whole one.
        """
        for end in [start for start in sorted(self.plan) if start > done]:
            cost = self.per_token(done).total * tokens * (end - done)
            if flops <= cost:
                break
            flops, done = flops - cost, end
        return done + round(flops / (self.per_token(done).total * tokens))


def _product(module: nn.Module) -> int:
    """FLOPs of multiplying one row with all matrices of a module, learned by gradient or by counts."""
    return 2 * sum(weight.numel() for weight in [*module.parameters(), *module.buffers()] if weight.dim() > 1)


@register_flop_formula(torch.ops.equipoise.swiglu, get_raw=True)
def _swiglu_flops(
    x_TD: Tensor, token_N: Tensor, weight_N: Tensor, gate_up: Tensor, down: Tensor, end_E: Tensor, kernel: str, **_: Any
) -> int:
    return 2 * int(end_E[-1]) * (gate_up[0].numel() + down[0].numel())


@register_flop_formula(torch.ops.equipoise.swiglu_backward, get_raw=True)
def _swiglu_backward_flops(grad_TD: Tensor, saved: list[Tensor], *rest: Any, **_: Any) -> int:
    _, _, gate_up, down, end_E, _, needs_weights = rest
    return 2 * int(end_E[-1]) * (gate_up[0].numel() + down[0].numel()) * (2 if needs_weights else 1)
