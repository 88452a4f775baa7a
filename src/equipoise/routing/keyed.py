"""Random numbers that follow from a key, the step and their place alone.

A recomputed forward pass, another rank and a resumed run draw the same numbers, no global generator moves, and nothing
waits for the device: a hash of the place (splitmix64) takes the place of a stream.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def new_key() -> Int[Tensor, ""]:
    """A key for one part of one layer, drawn from torch's generator; save it as a buffer."""
    return torch.randint(2**62, (), dtype=torch.int64)


def uniform(key: Int[Tensor, ""], step: Int[Tensor, ""], shape: tuple[int, ...], salt: int = 0) -> Float[Tensor, "..."]:
    """Numbers in (0, 1), fp64, that differ by key, step, place and ``salt`` (a call's own counter of draws)."""
    place = torch.arange(math.prod(shape), dtype=torch.int64, device=key.device)
    # 52 bits: the largest number of 53 and a half would round to 1.
    mixed = _mix(place + _mix(_mix(_mix(key) + salt) + step))
    return (((mixed >> 12) & (2**52 - 1)).double() + 0.5).mul(2.0**-52).view(shape)


def normal(key: Int[Tensor, ""], step: Int[Tensor, ""], shape: tuple[int, ...], salt: int = 0) -> Float[Tensor, "..."]:
    """Standard normal numbers, fp64; arguments as for ``uniform``."""
    return torch.special.ndtri(uniform(key, step, shape, salt))


def _mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """splitmix64's step and finaliser; int64 wraps around, and shifts are masked to be logical."""
    x = x + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & (2**33 - 1))


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant
