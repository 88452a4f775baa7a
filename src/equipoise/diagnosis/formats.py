"""Loads that others recorded, read as a trace: our own directories, SGLang's dumps, arrays as EPLB takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num

from equipoise.diagnosis.sglang import read_sglang
from equipoise.diagnosis.trace import Trace
from equipoise.diagnosis.trace_files import NAME, read_json, read_trace
from equipoise.errors import UserError, require


def read_loads(path: str | Path) -> Trace:
    """Read a trace, whoever recorded it.

    - a directory that Equipoise wrote;
    - ``.pt``, or a directory of them: dumps of SGLang's expert distribution recorder, of all ranks;
    - ``.npy`` or ``.json``: loads [L, E] or [W, L, E], as EPLB takes them (``weight``), plain or as ``logical_count``.

    Fails: UserError if the file cannot be read, is damaged, or holds something else.
    """
    place = Path(path)
    require(place.exists(), f"{place} does not exist; give a trace, an SGLang dump (.pt), or loads as .npy or .json.")
    if place.is_dir():
        dumps = sorted(place.glob("*.pt"))
        return read_sglang(dumps) if dumps and not (place / NAME).exists() else read_trace(place)
    if place.suffix == ".pt":
        return read_sglang([place])
    if place.suffix == ".npy":
        return from_loads(_read_npy(place))
    require(place.suffix == ".json", f"{place} has an unknown ending; loads are .json, .npy, .pt or a trace directory.")
    values = read_json(place)
    values = values.get("logical_count", values.get("weight")) if isinstance(values, dict) else values
    try:
        return from_loads(values)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def from_loads(loads: Any) -> Trace:
    """A trace of loads [L, E], one window, or [W, L, E].

    Fails: UserError for another shape, and for loads that are not finite numbers of at least 0.
    """
    try:
        array = np.asarray(loads)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    numeric = array.dtype.kind in "iuf"
    require(numeric, "Loads must be an array of numbers, [L, E] or [W, L, E], with rows of equal length.")
    require(array.ndim in (2, 3), f"Loads must have the shape [L, E] or [W, L, E], not {list(array.shape)}.")
    load_WLE = _widened(array[None] if array.ndim == 2 else array)
    return Trace(load_WLE=load_WLE, layers=tuple(str(layer) for layer in range(load_WLE.shape[1])))


def _widened(array: Num[np.ndarray, "W L E"]) -> Num[np.ndarray, "W L E"]:
    return array.astype(np.float64 if array.dtype.kind == "f" else np.int64)


def _read_npy(path: Path) -> np.ndarray:
    try:
        # A map reads nothing yet, so a header that claims more than the file holds is found without room for it.
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise UserError(f"{path} is not a whole .npy array of numbers ({error}); save it anew.") from error
