"""What any layer with balanced routing has: its parts, their losses and statistics, and the window they fill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from equipoise.balancing.recomputation import current_checkpoint, in_backward, refuse_lost_backward
from equipoise.balancing.window import Window
from equipoise.contracts import Call, NonFiniteError, Routing, Scores, Stateful
from equipoise.errors import UserError
from equipoise.sparsity import Sparsity

if TYPE_CHECKING:
    from equipoise.routing.override import Hook


class BalancedLayer(nn.Module):
    """A layer that routes tokens to experts and is balanced; ``attach`` and ``load_stats`` find these.

    Args:
        router, scorer, selector, balancers, experts: the parts.
        top_k: K, experts per token; or K by step, as ``{0: 8, 1000: 1}``.

    Attributes:
        num_experts: E, without null experts.
        top_k: K at the present step.
        sparsity: K by step.
        step: optimizer steps so far; saved with the model, since schedules read it.
        window: what was counted since the last step.
        override: a hook that takes the selector's place; see ``equipoise.override``.
        ratio_B: the share of masked tokens of each sequence; see ``equipoise.denoising``.
        routing: the last call's Routing, detached; None before it.
        logit_total: the sum of the last call's logits; not finite where one of them is not.
    """

    router: Any  # nn.Module forgets the types of its children
    scorer: Any
    selector: Any
    balancers: Any
    experts: Any
    step: Tensor

    def __init__(
        self,
        router: nn.Module,
        scorer: nn.Module,
        selector: nn.Module,
        balancers: nn.ModuleDict,
        experts: nn.Module,
        top_k: int | Mapping[int, int],
    ):
        super().__init__()
        self.router, self.scorer, self.selector, self.balancers = router, scorer, selector, balancers
        self.experts = experts
        self.num_experts = self.router.weight.shape[0] - self.selector.nulls
        self.sparsity = Sparsity.of(top_k, self.num_experts)
        for k in self.sparsity.top_k:
            self.selector.refuse(k)
        self.top_k = self.sparsity.at(0)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(_follow_loaded_step)
        learns = any(isinstance(p, Stateful) or getattr(p, "needs_all_ranks", False) for p in self._parts().values())
        self.window = Window(balancers, learns)
        self.override: Hook | None = None
        self.ratio_B: Tensor | None = None
        self.routing: Routing | None = None
        self.logit_total: Tensor | None = None

    def call(self, x: Float[Tensor, "*batch D"], mask: Bool[Tensor, "*batch"] | None) -> Call:
        """What the parts may read of this call; padding is zeroed, so that nothing in it can spread.

        Fails: UserError for tokens of a wrong width or type, or a mask that does not fit them.
        """
        refuse_wrong_input(x, mask, self.router.weight.shape[1])
        if self.training and not torch.compiler.is_compiling():
            self._note_checkpointing()
        x_TD = x.reshape(-1, x.shape[-1])
        mask_T = None if mask is None else mask.reshape(-1)
        if mask_T is not None:
            x_TD = x_TD.masked_fill(~mask_T[:, None], 0)
        length = x.shape[-2] if x.dim() > 2 else max(1, x_TD.shape[0])
        sequence_T = torch.arange(x_TD.shape[0], device=x.device) // length
        num_sequences = x.shape[:-2].numel() if x.dim() > 2 else 1
        call = self._call(x_TD, mask_T, sequence_T, self.training)
        return replace(call, num_sequences=num_sequences, ratio_B=self._ratios(num_sequences, x.device))

    def choose(self, call: Call, scores: Scores) -> Routing:
        """Let the selector choose the rows, or the hook that overrides it."""
        hook = self._held("override")
        return self.selector(call, scores) if hook is None else hook(call, scores, self.selector)

    def refuse_nonfinite(self, scores: Scores) -> None:
        """Stop at NaN or infinite logits where looking is free; elsewhere ``logit_total`` tells whoever synchronises.

        Fails: NonFiniteError.
        """
        self.logit_total = scores.logit_TE.detach().sum()
        real = type(self.logit_total) is Tensor and self.logit_total.is_cpu  # neither fake nor traced
        if real and not torch.compiler.is_compiling() and not self.logit_total.isfinite():
            raise NonFiniteError(self)

    def losses(self, call: Call, scores: Scores, routing: Routing) -> dict[str, Tensor]:
        """The carriers of the balancers' losses, by balancer."""
        found = {name: balancer.loss(call, scores, routing) for name, balancer in self.balancers.items()}
        return {name: carrier for name, carrier in found.items() if carrier is not None}

    def statistics(self, call: Call, scores: Scores, routing: Routing) -> dict[str, Tensor]:
        """What this call adds to the window: the layer's own counts, and each part's as ``"part.name"``."""
        counts = {
            "demand_E": routing.demand_E(),
            "dropped": routing.dropped_E.sum(),
            "tokens": call.tokens(),
        }
        for part, module in self._parts().items():
            if isinstance(module, Stateful):
                found = module.statistics(call, scores, routing)
                counts |= {f"{part}.{name}": value for name, value in found.items()}
        return counts

    def blank_statistics(self) -> dict[str, Tensor]:
        """The statistics of a window in which this rank saw nothing, for ranks that must add something."""
        weight = self.router.weight  # may be sharded, and so is only asked for its shape; may be fp32 in any model
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        x_TD = torch.zeros(0, weight.shape[1], dtype=dtype, device=weight.device)
        call = self._call(x_TD, None, x_TD.new_zeros(0).long(), training=True)
        scores = Scores(*[x_TD.new_zeros(0, weight.shape[0])] * 4)
        routing = self.selector(call, scores)
        losses = {f"loss.{name}": scores.prob_TE.new_zeros(()) for name in self.losses(call, scores, routing)}
        return self.statistics(call, scores, routing) | {"calls": torch.zeros_like(self.step)} | losses

    def commit(self, total: dict[str, Tensor], trained: Tensor) -> None:
        """Move every part that learns by a finished window's sums over all ranks.

        Args:
            trained: 0-d bool, whether any layer on any rank saw a micro-batch.
        """
        for part, module in self._parts().items():
            if isinstance(module, Stateful):
                own = {name.partition(".")[2]: value for name, value in total.items() if name.startswith(f"{part}.")}
                module.update(own)
        self.step += trained.to(self.step.device)
        self.follow_sparsity()
        self.window.last = total

    def follow_sparsity(self) -> None:
        """Take K of the present step. ``commit`` and ``load_state_dict`` do; whoever fills ``step`` in place must."""
        if not self.sparsity.constant and not self.step.is_meta:
            self.top_k = self.sparsity.at(int(self.step))

    @property
    def looks_ahead(self) -> bool:
        """Whether training gives a token experts that depend on other tokens of the call, later ones included."""
        return any(getattr(module, "looks_ahead", False) for module in self._parts().values())

    def across_layers(self) -> list[str]:
        """The parts whose state is one for all layers, and so moves by the statistics of all."""
        return [part for part, module in self._parts().items() if getattr(module, "across_layers", False)]

    def readings(self) -> dict[str, Tensor]:
        """What the parts tell of their state, 0-d each, as ``"part.name"``."""
        found = {part: module.readings() for part, module in self._parts().items() if hasattr(module, "readings")}
        return {f"{part}.{name}": value for part, values in found.items() for name, value in values.items()}

    def _call(self, x_TD: Tensor, mask_T: Tensor | None, sequence_T: Tensor, training: bool) -> Call:
        sizes = self.top_k, self.step, self.num_experts
        return Call(x_TD, mask_T, sequence_T, *sizes, self.router, self.experts, training)

    def _note_checkpointing(self) -> None:
        """Refuse a checkpoint that loses its backward; forget the scale of a backward pass that failed."""
        if not torch.is_grad_enabled():
            refuse_lost_backward()
        if self.window.handle is not None and not in_backward():
            self.window.handle.forget_scale()

    def _held(self, attribute: str) -> Any:
        """What a block set for this forward; a checkpoint keeps it, and recomputes in the backward, after the block."""
        value = getattr(self, attribute)
        if torch.compiler.is_compiling():
            return value
        recomputed = in_backward()
        if value is None and not recomputed:
            return None
        checkpoint, name = current_checkpoint(), f"equipoise_{attribute}_{int(self.window.key)}"
        if recomputed:
            return getattr(checkpoint, name, None)
        if checkpoint is not None:
            setattr(checkpoint, name, value)
        return value

    def _ratios(self, num_sequences: int, device: torch.device) -> Tensor | None:
        """The ratios of this forward's sequences. Fails: UserError where they are another number."""
        ratio_B = self._held("ratio_B")
        if ratio_B is not None and tuple(ratio_B.shape) != (num_sequences,):
            shape = list(ratio_B.shape)
            raise UserError(f"denoising was given ratios {shape} for {num_sequences} sequences; give one for each.")
        return None if ratio_B is None else ratio_B.to(device)

    def _parts(self) -> dict[str, Any]:
        parts = {"router": self.router, "scorer": self.scorer, "selector": self.selector}
        return parts | dict(self.balancers.items())


def _follow_loaded_step(layer: BalancedLayer, keys: Any) -> None:
    layer.follow_sparsity()


def refuse_wrong_input(x: Tensor, mask: Tensor | None, dim: int, axes: str = "...") -> None:
    """Stop at what is no input of a layer of width ``dim``.

    Args:
        axes: what stands before the width: ``"..."``, or ``"..., S"`` where tokens come in sequences.
    Fails: UserError for tokens of a wrong width or type, or a mask that does not fit them.
    """
    if x.dim() < len(axes.split(",")) or x.shape[-1:] != (dim,) or not x.is_floating_point():
        raise UserError(f"The layer takes floating-point tokens [{axes}, {dim}], not {x.dtype} {list(x.shape)}.")
    if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
        raise UserError(
            f"mask must be bool {list(x.shape[:-1])}, True for a real token, not {mask.dtype} {list(mask.shape)}."
        )


def balanced_layers(model: nn.Module) -> dict[str, BalancedLayer]:
    """The model's balanced layers by name, in the model's order; wrappers (DDP, compiled) leave no trace."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod  # type: ignore
    found = {name: module for name, module in model.named_modules() if isinstance(module, BalancedLayer)}
    return {name.replace("_orig_mod.", ""): module for name, module in found.items()}
