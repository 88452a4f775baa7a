"""Which kernel multiplies the experts' rows: an explicit rule, and its answer is recorded by whoever asks."""

import torch

from equipoise.errors import require
from equipoise.kernels import KERNELS, grouped_mm


def refuse_unknown(kernel: str) -> None:
    """Fails: UserError unless ``choose`` knows the name."""
    known = ("auto", *KERNELS)
    require(kernel in known, f"Unknown kernel {kernel!r}; choose one of {', '.join(known)}.")


def choose(kernel: str, dtype: torch.dtype, widths: tuple[int, ...]) -> str:
    """Resolve ``"auto"``: ``grouped_mm`` where torch's takes this dtype and these row widths, else ``loop``.

    Args:
        kernel: ``"auto"`` or a key of ``KERNELS``.
        dtype: of the rows.
        widths: elements per row of every matrix involved.
    Fails: UserError for a kernel that was asked for and cannot do it.
    """
    if kernel == "auto":
        return "loop" if grouped_mm.refusal(dtype, widths) else "grouped_mm"
    reason = grouped_mm.refusal(dtype, widths) if kernel == "grouped_mm" else None
    require(reason is None, f"Kernel 'grouped_mm' cannot be used: {reason}; choose kernel='loop' or 'auto'.")
    return kernel
