"""Dumps of SGLang's expert distribution recorder (read in its source, 0.5): ``torch.save`` dictionaries.

Modes ``stat`` and ``stat_approx`` hold ``logical_count`` [steps, L, E], summed over the ranks. Modes ``per_pass`` and
``per_token`` write one file per rank, with ``last_physical_to_logical_map`` [L, P] and ``records``: for every forward
pass the rank's ``global_physical_count`` [L, P], the latter also the physical experts (-1 for none) of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from equipoise.diagnosis.trace import Trace, from_routing
from equipoise.errors import UserError, require


def read_sglang(paths: Sequence[Path]) -> Trace:
    """One trace of the dumps of all ranks. Only tensors and plain values are unpickled, by torch's restricted reader.

    Fails: UserError for a file that holds anything else, is truncated, or is no such dump; and for files of two modes.
    """
    dumps = [_load(path) for path in paths]
    try:
        if all("logical_count" in dump for dump in dumps):
            counts = [_array(dump["logical_count"]) for dump in dumps]
            load = np.concatenate([count[None] if count.ndim == 2 else count for count in counts])
            return Trace(load_WLE=_recorded(load), layers=_names(load.shape[1]), about={"source": "SGLang"})
        known = all("records" in dump and "last_physical_to_logical_map" in dump for dump in dumps)
        require(known, f"{paths[0]} and its like are not SGLang dumps of one mode; read one recording at a time.")
        return _from_records(dumps)
    except UserError:
        raise
    except Exception as error:  # whatever else a file that anybody wrote may hold instead of arrays
        raise UserError(f"{paths[0]} is not a whole SGLang dump ({type(error).__name__}); dump it anew.") from error


def _load(path: Path) -> dict[str, Any]:
    import torch

    try:
        dump = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets whatever a hostile or truncated file holds
        raise UserError(
            f"{path} is truncated, or holds more than tensors and plain values, which is never loaded; dump it anew."
        ) from error
    require(isinstance(dump, dict), f"{path} is not an SGLang dump: it holds no dictionary; dump it anew.")
    return dump


def _from_records(dumps: list[dict[str, Any]]) -> Trace:
    maps = [_array(dump["last_physical_to_logical_map"]) for dump in dumps]
    same = all(np.array_equal(maps[0], other) for other in maps)
    require(same, "The dumps' ranks have different physical_to_logical_map; read one recording at a time.")
    records = [record for dump in dumps for record in dump["records"]]
    require(bool(records), "The dumps hold no forward pass; record while requests are served.")
    passes = {number: w for w, number in enumerate(sorted({record["forward_pass_id"] for record in records}))}
    window = [passes[record["forward_pass_id"]] for record in records]
    if all("topk_ids_of_layer" in record for record in records):
        return _from_tokens(records, window, maps[0])
    L, P = maps[0].shape
    load = np.zeros((len(passes), L, int(maps[0].max()) + 1), np.int64)
    for w, record in zip(window, records):
        count = _array(record["global_physical_count"])
        require(count.shape == (L, P), f"A forward pass has counts {count.shape} instead of {(L, P)}; dump it anew.")
        np.add.at(load[w], (np.arange(L)[:, None], maps[0]), count)
    return Trace(load_WLE=load, layers=_names(L), about={"source": "SGLang"})


def _from_tokens(
    records: list[dict[str, Any]], window: list[int], physical_to_logical: Int[np.ndarray, "L P"]
) -> Trace:
    slot_TLK = np.concatenate([_array(record["topk_ids_of_layer"]).transpose(1, 0, 2) for record in records])
    L, P = physical_to_logical.shape
    within = slot_TLK.size == 0 or (slot_TLK.min() >= -1 and slot_TLK.max() < P)
    require(bool(within), f"The dumps' tokens went to experts beyond the {P} physical ones; dump it anew.")
    expert_TLK = np.where(slot_TLK < 0, -1, physical_to_logical[np.arange(L)[:, None], slot_TLK])
    used = (expert_TLK >= 0).any((0, 1))  # the recorder has room for eight experts per token
    ids = [np.array(record["input_ids"], np.int64) for record in records]
    return from_routing(
        np.ascontiguousarray(expert_TLK[:, :, used]),
        np.repeat(window, [len(token) for token in ids]),
        int(physical_to_logical.max()) + 1,
        token_T=np.concatenate(ids),
        about={"source": "SGLang"},
    )


def _recorded(load: Int[np.ndarray, "W L E"]) -> Int[np.ndarray, "V L E"]:
    """Without the empty steps that the recorder's buffer still holds."""
    kept = load[load.any((1, 2))]
    require(len(kept) > 0, "The dump's counts are all 0; record while requests are served.")
    return kept


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(tensor).astype(np.int64)


def _names(layers: int) -> tuple[str, ...]:
    return tuple(str(layer) for layer in range(layers))
