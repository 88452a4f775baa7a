"""Kernels that multiply each expert's rows with that expert's weight."""
