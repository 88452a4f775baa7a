"""What a layer must know of activation checkpointing: is it recomputed, for which backward, or in vain?

torch does not say, so the answers are read off the Python stack: a reentrant checkpoint is a ``CheckpointFunction``,
whose context is the same object in forward and in every backward; a non-reentrant one is its ``_CheckpointFrame``.
"""

import sys
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor

from equipoise.errors import require

_FORWARD = checkpointing.CheckpointFunction.forward.__code__
_BACKWARD = checkpointing.CheckpointFunction.backward.__code__


def in_backward() -> bool:
    """Whether a backward pass is running: a forward that finds one is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def current_checkpoint() -> Any | None:
    """The outermost checkpoint that this forward is part of: the same object when it is recomputed. None outside."""
    found = None
    for frame in _stack():
        if frame.f_code in (_FORWARD, _BACKWARD):
            found = frame.f_locals["ctx"]
        elif frame.f_code.co_filename == checkpointing.__file__ and frame.f_code.co_name == "unpack_hook":
            found = frame.f_locals["frame"]
        elif frame.f_code.co_filename == checkpointing.__file__ and frame.f_code.co_name == "checkpoint":
            running = frame.f_locals.get("gen")  # a reentrant one has none
            found = running.gi_frame.f_locals["new_frame"] if running is not None else found
    return found


def is_repeated() -> bool:
    """Whether a reentrant checkpoint is running its backward for a second time.

    Every backward of such a checkpoint recomputes its inside and makes new taps, so a tap cannot know by itself. The
    gradients that came from outside are new each time, and gone when it is over.
    """
    frames = [frame for frame in _stack() if frame.f_code is _BACKWARD]
    if not frames:
        return False
    context, gradients = frames[-1].f_locals["ctx"], frames[-1].f_locals["args"]
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
    frames = [frame for frame in _stack() if frame.f_code is _FORWARD]
    inputs = frames[-1].f_locals["args"] if frames else ()
    require(
        not frames or any(isinstance(value, Tensor) and value.requires_grad for value in inputs),
        "Reentrant checkpointing around an MoE layer needs an input that requires grad, or nothing inside is trained; "
        "use checkpoint(..., use_reentrant=False), or x.requires_grad_(); to evaluate, call .eval() first.",
    )


def _stack() -> Iterator[FrameType]:
    """The running calls, innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
