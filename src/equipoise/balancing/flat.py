"""Several named tensors as one flat tensor and a text that says what stands where.

A custom operator pays for every tensor it is given, and takes no dictionaries; it takes one tensor and one string.
"""

import functools
import math

import torch
from torch import Tensor


def pack(tensors: dict[str, Tensor], like: Tensor) -> tuple[Tensor, str]:
    """One flat tensor (of ``like``'s dtype if there is nothing to pack) and its layout, as ``"name:2x3,other:"``."""
    layout = ",".join(f"{name}:{'x'.join(map(str, tensor.shape))}" for name, tensor in tensors.items())
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()]) if tensors else like.new_empty(0), layout


def unpack(flat: Tensor, layout: str) -> dict[str, Tensor]:
    """The opposite of ``pack``: views of the flat tensor."""
    shapes = _shapes(layout)
    pieces = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces)}


def names(layout: str) -> tuple[str, ...]:
    """What is packed, in order."""
    return tuple(_shapes(layout))


@functools.cache
def _shapes(layout: str) -> dict[str, tuple[int, ...]]:
    entries = (entry.split(":") for entry in layout.split(",") if entry)
    return {name: tuple(int(size) for size in shape.split("x") if size) for name, shape in entries}
