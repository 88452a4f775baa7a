"""What a layer must know of activation checkpointing: is it recomputed, for which backward, or in vain?"""

import sys
import weakref
from types import CodeType, FrameType

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from equipoise.contracts import require


def in_backward() -> bool:
    """Whether a backward pass is running: a forward that finds one is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def is_repeated() -> bool:
    """Whether a reentrant checkpoint is running its backward for a second time.

    Every backward of such a checkpoint recomputes its inside and makes new taps, so a tap cannot know by itself. The
    gradients that came from outside are new each time, and gone when it is over.
    """
    frame = _outermost(CheckpointFunction.backward.__code__)
    if frame is None:
        return False
    context, gradients = frame.f_locals["ctx"], frame.f_locals["args"]
    now = next(gradient for gradient in gradients if isinstance(gradient, Tensor))
    first = getattr(context, "equipoise_first_gradient", None)
    if first is None:
        context.equipoise_first_gradient = weakref.ref(now)
    return first is not None and first() is not now


def refuse_lost_backward() -> None:
    """Refuse reentrant checkpointing none of whose inputs requires grad: its backward, and so the tap's, never runs.

    Called where a training layer finds gradients switched off, which is what such a checkpoint does. A training layer
    that is only read, inside a reentrant checkpoint and ``no_grad``, looks the same and is refused too.

    Fails: UserError.
    """
    frame = _outermost(CheckpointFunction.forward.__code__)
    inputs = () if frame is None else frame.f_locals["args"]
    require(
        frame is None or any(isinstance(value, Tensor) and value.requires_grad for value in inputs),
        "Reentrant checkpointing around an MoE layer needs an input that requires grad, or nothing inside is trained; "
        "use checkpoint(..., use_reentrant=False), or x.requires_grad_(); to evaluate, call .eval() first.",
    )


def _outermost(code: CodeType) -> FrameType | None:
    """The outermost running call of a function."""
    frame, found = sys._getframe(), None
    while frame is not None:
        found = frame if frame.f_code is code else found
        frame = frame.f_back
    return found
