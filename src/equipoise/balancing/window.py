"""What one layer has counted since the last optimizer step, and the scale of the loss it was counted under."""

from __future__ import annotations

import copy
import itertools
import warnings
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn

from equipoise.balancing.flat import names, unpack

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
        last: by name, the sums of the last finished window over all ranks; empty before the first.
        handle: who closes the window; None before ``attach``.
        key: the window's number as a CPU tensor, for the tap.
        anchor: a 0-d tensor that requires grad, so that the tap's backward runs though all else be frozen.
    """

    def __init__(self, balancers: nn.ModuleDict, learns: bool):
        self.balancers: Any = balancers
        self.learns = learns
        self.clear()
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

    @property
    def sums(self) -> dict[str, Tensor]:
        """By name, this rank's sums since the last step; empty where nothing was counted."""
        if not self._flat:
            return {}
        losses, *layouts = self._layout.split(";")
        values = [unpack(flat, layout) for flat, layout in zip(self._flat[1:], layouts)]
        loss = {f"loss.{name}": value for name, value in zip(names(losses), self._flat[0])}
        calls = {"calls": torch.full((), self._calls, device=self._flat[1].device)}
        return {**values[0], **values[1], **calls, **loss}

    def clear(self) -> None:
        """Forget what was counted since the last step."""
        self._flat: list[Tensor] = []
        self._layout, self._calls = "", 0

    def record(self, carrier: Tensor, count: Tensor, amount: Tensor, layout: str) -> Tensor:
        """Add one micro-batch and return the carriers' gradient, at the scale that the loop applies to its loss.

        Args:
            carrier: the loss carriers by balancer, flat (see ``flat.pack``).
            count: the statistics of integers, flat.
            amount: the statistics of floating-point numbers, flat.
            layout: of the three, joined by ``";"``.
        """
        if self.handle is None:
            self.clear()  # without a handle no window ever closes: each micro-batch is one
        losses, counts, _ = layout.split(";")
        carriers = unpack(carrier, losses)
        now = unpack(count, counts)
        before = unpack(self._flat[1], counts)["demand_E"] if self._flat else 0
        demand_E = self._over_ranks(now["demand_E"] + before, carriers)
        scale = self._scale(bool(carriers))
        slopes = {name: self.balancers[name].slope(value, demand_E) for name, value in carriers.items()}
        values = [(slopes[name] * value).sum() * now["tokens"] for name, value in carriers.items()]
        flat = [torch.stack(values) if values else carrier, count, amount]
        self._flat = [a + b for a, b in zip(self._flat, flat)] if self._flat else [each.clone() for each in flat]
        self._layout, self._calls = layout, self._calls + 1
        gradients = [slopes[name] * (scale * self.balancers[name].weight) for name in carriers]
        return torch.cat([gradient.reshape(-1) for gradient in gradients]).to(carrier.dtype) if gradients else carrier

    def _over_ranks(self, demand_E: Int[Tensor, " E"], carriers: Iterable[str]) -> Int[Tensor, " E"]:
        """The window's demand over all ranks where a loss needs it, else as it is."""
        needed = any(self.balancers[name].needs_all_ranks for name in carriers)
        if needed and self.handle is not None and self.handle.world_size > 1:
            dist.all_reduce(demand_E, group=self.handle.group)
        return demand_E

    def _scale(self, has_losses: bool) -> Tensor | float:
        """The factor the loop applies to its loss; 1, and a warning, where nobody said."""
        scale = None if self.handle is None else self.handle.scale
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
