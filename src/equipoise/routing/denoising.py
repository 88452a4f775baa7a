"""What a diffusion language model tells its layers: how noisy each sequence is at this denoising step."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from equipoise.balancing.balanced import balanced_layers
from equipoise.errors import require

SCHEDULES = ("linear", "linear_reverse", "cosine", "cosine_reverse", "gaussian", "gaussian_reverse")


@contextmanager
def denoising(model: nn.Module, ratio_B: Float[Tensor, " B"]) -> Iterator[None]:
    """Tell every MoE layer of ``model`` the share of masked tokens of each sequence, for the calls inside the block.

    Args:
        ratio_B: r of each sequence, in [0, 1], on any device; on the CPU it is checked (elsewhere looking would wait).
    Fails: UserError where the model has no MoE layer, or the ratios are none; the layer's call, where it has another
        number of sequences.
    """
    layers = balanced_layers(model)
    require(bool(layers), "The model has no MoE layer, so there is nobody to tell the ratios.")
    _refuse_wrong_ratios(ratio_B)
    before = {name: layer.ratio_B for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.ratio_B = ratio_B
        yield
    finally:
        for name, previous in before.items():
            layers[name].ratio_B = previous


def _refuse_wrong_ratios(ratio_B: Any) -> None:
    right = isinstance(ratio_B, Tensor) and ratio_B.is_floating_point() and ratio_B.dim() == 1
    require(right, "denoising takes the ratios as a floating-point tensor [B], one for each sequence.")
    if type(ratio_B) is Tensor and ratio_B.is_cpu and not torch.compiler.is_compiling():  # neither fake nor traced
        inside = bool(((ratio_B >= 0) & (ratio_B <= 1)).all())  # NaN is not
        require(inside, "Every ratio of denoising is a share of masked tokens and must lie between 0 and 1.")


def experts_by_ratio(
    ratio_B: Float[Tensor, " B"], schedule: str, k_min: int, k_max: int, sigma: float
) -> Int[Tensor, " B"]:
    """K of each sequence: ``round(k_min + (k_max - k_min) s(r))``.

    Args:
        schedule: ``linear`` (s = r), ``cosine`` (s = (1 - cos pi r) / 2), ``gaussian`` (a bell that is 1 at r = 1/2 and
            0 at both ends), or one minus one of these, as ``linear_reverse``.
        sigma: width of the bell.

    Source: EC-DLM (2604.01622) and its authors' code. Differs: no.
    """
    kind, _, reverse = schedule.partition("_")
    if kind == "linear":
        share_B = ratio_B
    elif kind == "cosine":
        share_B = (1 - torch.cos(math.pi * ratio_B)) / 2
    else:
        # (exp a - exp b) / (1 - exp b), exact for wide bells too
        share_B = 1 - torch.expm1(-((ratio_B - 0.5) ** 2) / (2 * sigma**2)) / math.expm1(-0.125 / sigma**2)
    share_B = 1 - share_B if reverse else share_B
    return (k_min + (k_max - k_min) * share_B).round().clamp(k_min, k_max).long()
