"""Kernels that multiply each expert's rows with that expert's weight."""

from equipoise.kernels import grouped_mm, loop, naive

KERNELS = {"naive": naive, "loop": loop, "grouped_mm": grouped_mm}
