"""Tie a model's balancers to its optimizers: counts are committed once per step, losses follow the loop's scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import Optimizer

from equipoise.balancing.balanced import balanced_layers
from equipoise.errors import require

Scale = Tensor | float


def attach(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], group: dist.ProcessGroup | None = None
) -> Handle:
    """Commit what the model's MoE layers count whenever the optimizers have stepped.

    A window of statistics lives as long as the gradients it was counted with: it is committed when every optimizer has
    stepped, and discarded when a step is skipped (infinite gradients under a GradScaler, fused or not) or gradients are
    zeroed through the optimizer without a step.

    Args:
        model: holds at least one MoE layer; DDP and compiled wrappers are fine.
        optimizer: one, several, or an empty sequence where ``handle.step()`` is called by hand.
        group: the data-parallel ranks whose counts belong to one step; None is the default group.
    Fails: UserError for a model without MoE layers, or one that is attached already.
    """
    optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else optimizer
    right = isinstance(model, nn.Module) and isinstance(optimizers, Sequence)
    right = right and all(isinstance(each, Optimizer) for each in optimizers)
    require(right, "attach takes a model and its optimizer, or a list of optimizers, in this order.")
    return Handle(model, tuple(dict.fromkeys(optimizers)), group)


class Handle:
    """What ``attach`` returns.

    Attributes:
        loss_scale: the factor the loop applies to its loss, where no ``follow`` sees it (pipeline stages); else None.
        layers: the model's MoE layers by name.
    """

    def __init__(self, model: nn.Module, optimizers: tuple[Optimizer, ...], group: dist.ProcessGroup | None):
        self.layers: dict[str, Any] = balanced_layers(model)
        require(bool(self.layers), "The model has no MoE layer, so there is nothing to attach.")
        attached = any(layer.window.handle is not None for layer in self.layers.values())
        require(not attached, "The model is attached already; call .remove() of its handle first.")
        _refuse_unequal(list(self.layers.values()))
        self.group = group
        self.loss_scale: Scale | None = None
        self._followed: Tensor | None = None
        self._optimizers, self._stepped = optimizers, set[int]()
        self._hooks = [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]
        self._undo = [self._watch_zero_grad(optimizer) for optimizer in optimizers]
        for layer in self.layers.values():
            layer.window.handle, layer.window.warned = self, False

    def follow(self, loss: Tensor, count: Tensor | int | None = None) -> Tensor:
        """Return the loss unchanged; its backward tells the balancing losses by what factor the loop scaled it.

        One loss can be followed in a backward pass: of several, follow the sum.

        Args:
            loss: 0-d; the micro-batch's training loss before accumulation, GradScaler or token counts scale it.
            count: how many tokens' losses it is the sum of; None where it is a mean.
        """
        shape = tuple(loss.shape)
        require(not shape, f"follow takes the 0-d loss, not a tensor of shape {shape}; reduce it first.")
        return _follow(loss, self, count)  # pyright: ignore[reportCallIssue] - torch leaves disable untyped

    @property
    def world_size(self) -> int:
        """The ranks whose counts belong to one step."""
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    @property
    def scale(self) -> Scale | None:
        """The factor that this backward pass has on a mean loss; None where nobody gave it."""
        return self.loss_scale if self._followed is None else self._followed

    def forget_scale(self) -> None:
        """A factor is good for the backward pass that applied it, not for a later one that nobody follows."""
        self._followed = None

    @torch.no_grad()
    def step(self) -> None:
        """Sum the windows over the ranks, update every part that learns, and open the next window."""
        self._stepped.clear()
        if self.world_size == 1 and not any(layer.window.sums for layer in self.layers.values()):
            return
        sums = [layer.window.sums or layer.blank_statistics() for layer in self.layers.values()]
        if self.world_size > 1:
            _all_reduce(sums, self.group)
        trained = torch.stack([total["calls"] for total in sums]).sum() > 0  # on some rank; asked without a wait
        _pool(list(self.layers.values()), sums)
        for layer, total in zip(self.layers.values(), sums):
            layer.commit(total, trained)
        self.discard()

    def discard(self) -> None:
        """Forget what was counted since the last step."""
        self._stepped.clear()
        for layer in self.layers.values():
            layer.window.clear()

    def remove(self) -> None:
        """Undo ``attach``."""
        for hook in self._hooks:
            hook.remove()
        for undo in self._undo:
            undo()
        for layer in self.layers.values():
            layer.window.handle, layer.window.last = None, {}
            layer.window.clear()
        self.layers = {}

    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # what a GradScaler tells a fused optimizer
        if found_inf is not None and bool(found_inf):  # an int where no parameter had a gradient
            self.discard()
            return
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self._optimizers):
            self.step()

    def _watch_zero_grad(self, optimizer: Optimizer) -> Callable[[], None]:
        """Let the window go with gradients that are thrown away: an unfused step that is skipped calls no hook.

        Returns: what undoes it.
        """
        own = vars(optimizer).get("zero_grad")
        zero_grad = optimizer.zero_grad

        def discarding(*args: Any, **kwargs: Any) -> None:
            if id(optimizer) not in self._stepped:
                self.discard()
            zero_grad(*args, **kwargs)

        def undo() -> None:
            if vars(optimizer).get("zero_grad") is not discarding:
                return  # someone has wrapped ours since; without layers it does nothing
            del optimizer.zero_grad
            if own is not None:
                optimizer.zero_grad = own  # type: ignore[method-assign]

        optimizer.zero_grad = discarding  # type: ignore[method-assign]
        return undo


@torch.compiler.disable
def _follow(loss: Tensor, handle: Handle, count: Tensor | int | None) -> Tensor:
    """Its backward acts on the handle, which no compiled graph may swallow."""
    return _Follow.apply(loss, handle, count)  # type: ignore[return-value]


class _Follow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, handle: Handle, count: Tensor | int | None) -> Tensor:
        ctx.handle, ctx.count = handle, 1 if count is None else count
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        alone = ctx.handle._followed is None
        require(
            alone, "Two followed losses meet in one backward pass, and may be scaled differently; follow their sum."
        )
        exact = grad.detach().to(torch.promote_types(grad.dtype, torch.float32))  # a count may be too large for fp16
        ctx.handle._followed = exact * ctx.count
        Variable._execution_engine.queue_callback(ctx.handle.forget_scale)
        return grad, None, None


def _refuse_unequal(layers: Sequence[Any]) -> None:
    """Fails: UserError where layers of unequal numbers of experts share a part that counts for each expert."""
    for part in {part for layer in layers for part in layer.across_layers()}:
        sums = [layer.blank_statistics() for layer in layers if part in layer.across_layers()]
        shapes = [{name: value.shape for name, value in one.items() if name.startswith(f"{part}.")} for one in sums]
        alike = all(one == shapes[0] for one in shapes)
        require(alike, f"Layers that share {part} must have equally many experts; give them their own methods.")


def _pool(layers: Sequence[Any], sums: list[dict[str, Tensor]]) -> None:
    """Give parts that are one over all layers the sum of what the layers counted, and how many layers that were."""
    pooled: dict[str, Tensor] = {}
    owners: dict[str, list[dict[str, Tensor]]] = {}
    for layer, total in zip(layers, sums):
        for part in layer.across_layers():
            owners.setdefault(part, []).append(total)
            for name in [name for name in total if name.startswith(f"{part}.")]:
                pooled[name] = pooled[name] + total[name] if name in pooled else total[name]
    for part, totals in owners.items():
        for total in totals:
            total |= {name: value for name, value in pooled.items() if name.startswith(f"{part}.")}
            total[f"{part}.layers"] = torch.full_like(total["calls"], len(totals))


def _all_reduce(sums: Iterable[dict[str, Tensor]], group: dist.ProcessGroup | None) -> None:
    """Sum every tensor over the ranks, in one message per dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for layer in sums:
        for name in sorted(layer):
            by_dtype.setdefault(layer[name].dtype, []).append(layer[name])
    for _, tensors in sorted(by_dtype.items(), key=lambda item: str(item[0])):
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=group)
        for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(piece.view_as(tensor))
