"""Numbers in words: for the terminal and the report alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
UNKNOWN = "unknown"


def number(value: float | int | None) -> str:
    """Four digits; large and small ones with an exponent."""
    if value is None:
        return UNKNOWN
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}".replace("e+", "e")


def count(value: float | int | None) -> str:
    """Parameters or tokens: three digits and a unit, 41.3M."""
    if value is None:
        return UNKNOWN
    for unit, letter in UNITS:
        if unit <= value < 1000 * unit:
            return f"{value / unit:.3g}{letter}"
    return number(value)


def bounds(values: Mapping[str, float | None], words: Callable[[float | None], str] = number) -> str:
    """An interval."""
    if values["low"] is None and values["high"] is None:
        return UNKNOWN
    return f"{words(values['low'])} to {words(values['high'])}"


def ranged(values: Mapping[str, float | None], words: Callable[[float | None], str] = number) -> str:
    """A value with its interval in brackets."""
    return f"{words(values['value'])} ({bounds(values, words)})"


SIZES = {"params": count, "tokens": count, "loss": number}
