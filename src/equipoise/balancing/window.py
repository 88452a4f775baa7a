"""What one layer has counted since the last optimizer step, and the scale of the loss it was counted under."""

from __future__ import annotations

import copy
import itertools
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from equipoise.balancing.attach import Handle

# Custom operators carry tensors, not objects: the tap finds its window by this number. Weak, so nothing is kept alive.
_WINDOWS: weakref.WeakValueDictionary[int, Window] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class Window:
    """Sums over the micro-batches since the last step: plain tensors, never buffers, which DDP would overwrite.

    Args:
        balancers: the layer's, by name.
        learns: some part of the layer moves with these sums, so that training without ``attach`` is an error to tell.

    Attributes:
        sums: by name, this rank's sums so far.
        last: by name, the sums of the last finished window over all ranks; empty before the first.
        handle: who closes the window; None before ``attach``.
        key: the window's number as a CPU tensor, for the tap.
        anchor: a 0-d tensor that requires grad, so that the tap's backward runs though all else be frozen.
    """

    def __init__(self, balancers: nn.ModuleDict, learns: bool):
        self.balancers: Any = balancers
        self.learns = learns
        self.sums: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.handle: Handle | None = None
        self.warned = False
        number = next(_NUMBERS)
        self.key = torch.tensor(number, dtype=torch.int64, device="cpu")
        self.key.window = self  # type: ignore[attr-defined] # a graph that outlives its layer keeps the window alive
        self.anchor = torch.zeros((), requires_grad=True, device="cpu")
        _WINDOWS[number] = self

    def __deepcopy__(self, memo: dict) -> Window:
        return Window(copy.deepcopy(self.balancers, memo), self.learns)

    def __reduce__(self) -> tuple:
        return Window, (self.balancers, self.learns)

    @staticmethod
    def of(key: Tensor) -> Window:
        """The window of this number."""
        return _WINDOWS[int(key)]

    def record(self, losses: dict[str, Tensor], statistics: dict[str, Tensor]) -> list[Tensor]:
        """Add one micro-batch and return each loss carrier's gradient, at the scale the loop applies to its loss."""
        if self.handle is None:
            self.sums.clear()  # without a handle no window ever closes: each micro-batch is one
        for name, value in statistics.items():
            self._add(name, value)
        scale = self._scale(bool(losses), statistics["tokens"])
        counts = [self.balancers[name].needs_all_ranks for name in losses]
        demand_E = self._demand_over_ranks() if any(counts) else statistics["demand_E"]
        gradients = []
        for name, carrier in losses.items():
            balancer = self.balancers[name]
            slope = balancer.slope(carrier, demand_E)
            self._add(f"loss.{name}", (slope * carrier).sum())
            gradients.append((slope * (scale * balancer.weight)).to(carrier.dtype))
        return gradients

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value.detach().clone()

    def _demand_over_ranks(self) -> Int[Tensor, " E"]:
        demand_E = self.sums["demand_E"]
        if self.handle is not None and self.handle.world_size > 1:
            demand_E = demand_E.clone()
            dist.all_reduce(demand_E, group=self.handle.group)
        return demand_E

    def _scale(self, has_losses: bool, tokens: Tensor) -> Tensor | float:
        """The factor the loop applies to its loss; 1, and a warning, where nobody said."""
        scale = None if self.handle is None else self.handle.scale_of(tokens)
        needs_attach = self.handle is None and self.learns
        if not self.warned and (needs_attach or (has_losses and scale is None)):
            self.warned = True
            warnings.warn(_WITHOUT_ATTACH if needs_attach else _WITHOUT_SCALE, stacklevel=2)
        return 1.0 if scale is None else scale


_WITHOUT_ATTACH = (
    "This MoE method learns from counts, but nobody commits them: call handle = equipoise.attach(model, optimizer) "
    "before training."
)
_WITHOUT_SCALE = (
    "The scale of the training loss is unknown, so balancing losses use 1: pass the loss through handle.follow(loss) "
    "of handle = equipoise.attach(model, optimizer), or set handle.loss_scale."
)
