"""Placements as files: our JSON, and what SGLang, EPLB and vLLM-Ascend exchange.

SGLang's ``--init-expert-location`` takes ``physical_to_logical_map`` and nothing beside it (read in its source: every
further key is passed on as an unknown argument), or ``logical_count``, from which it places by itself.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int

from equipoise.diagnosis.trace_files import read_json
from equipoise.errors import UserError, require
from equipoise.placement.placement import Placement

Format = Literal["equipoise", "sglang", "eplb", "vllm_ascend"]
FORMATS = get_args(Format)
NAME = "equipoise-placement"
SCHEMA = 1


def write_placement(placement: Placement, path: str | Path, form: Format = "equipoise") -> None:
    """Write a placement; what was in the file before stays until all of it is written.

    Fails: UserError for an unknown format, or if it cannot be written.
    """
    require(form in FORMATS, f"There is no format {form!r}; there are {', '.join(FORMATS)}.")
    write_whole(Path(path), json.dumps(_WRITERS[form](placement)))


def write_whole(target: Path, text: str) -> None:
    """Write a text file, all of it or nothing.

    Fails: UserError if it cannot be written.
    """
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".tmp-{target.name}-", dir=target.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, target)
    except OSError as error:
        if partial is not None and os.path.exists(partial):
            os.unlink(partial)
        raise UserError(f"Cannot write {target}: {error.strerror}; choose another place.") from error


def read_placement(path: str | Path, devices: int | None = None, nodes: int = 1) -> Placement:
    """Read a placement of any format; its keys say which it is.

    Args:
        path: a JSON file.
        devices: needed where the format does not say (SGLang's and EPLB's).
        nodes: where the format does not say.
    Fails: UserError if the file is damaged or no placement, or if the devices are needed and not given.
    """
    place = Path(path)
    values = read_json(place)
    require(isinstance(values, dict), f"{place} is not a placement; it must hold a JSON object.")
    try:
        return _read(values, devices, nodes)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except Exception as error:  # a hostile file may be wrong in any way; none may pass as a placement
        raise UserError(f"{place} is not a whole placement ({type(error).__name__}); write it anew.") from error


def _read(values: Mapping[str, Any], devices: int | None, nodes: int) -> Placement:
    if values.get("format") == NAME:
        return _from_equipoise(values)
    if "layer_list" in values:
        return _from_vllm_ascend(values, nodes)
    key = next((key for key in ("physical_to_logical_map", "phy2log") if key in values), "")
    require(key != "", "there is no placement in it that Equipoise knows; see docs/guides/placement.md.")
    require(devices is not None, "the format does not say how many devices there are; give them.")
    order_LP = _order(values[key])
    return Placement(
        physical_to_logical=order_LP, num_experts=int(order_LP.max()) + 1, devices=devices or 1, nodes=nodes
    )


def _order(rows: Any) -> Int[np.ndarray, "L P"]:
    order_LP = np.array(rows)
    whole = order_LP.ndim == 2 and order_LP.size > 0 and order_LP.dtype.kind == "i"
    require(whole, "its slots must be lists of whole numbers, one of equal length for each layer.")
    return order_LP.astype(np.int64)


def _equipoise(placement: Placement) -> dict[str, Any]:
    predicted = {"balance_L": placement.balance_L, "bound_L": placement.bound_L}
    return {
        "format": NAME,
        "schema": SCHEMA,
        "num_experts": placement.num_experts,
        "devices": placement.devices,
        "nodes": placement.nodes,
        **placement.facts(),
        **{name: None if array is None else array.tolist() for name, array in predicted.items()},
        "physical_to_logical": placement.physical_to_logical.tolist(),
    }


def _from_equipoise(values: Mapping[str, Any]) -> Placement:
    version = values["schema"]
    require(version == SCHEMA, f"it has placement schema {version!r}, this version reads {SCHEMA}; place anew.")
    counts = {name: values[name] for name in ("num_experts", "devices", "nodes", "moved")}
    for name, count in counts.items():
        require(type(count) is int, f"{name} must be a whole number, not {count!r}.")
    L = len(values["physical_to_logical"])
    balance_L, bound_L = (
        None if values[name] is None else np.array(values[name], np.float64).reshape(L)
        for name in ("balance_L", "bound_L")
    )
    return Placement(
        physical_to_logical=_order(values["physical_to_logical"]),
        solver=str(values["solver"]),
        expert_bytes=values["expert_bytes"],
        num_experts=counts["num_experts"],
        devices=counts["devices"],
        nodes=counts["nodes"],
        moved=counts["moved"],
        balance_L=balance_L,
        bound_L=bound_L,
    )


def _sglang(placement: Placement) -> dict[str, Any]:
    return {"physical_to_logical_map": placement.physical_to_logical.tolist()}


def _eplb(placement: Placement) -> dict[str, Any]:
    """``rebalance_experts``' three answers: experts of slots, slots of experts (-1 where there is no more), copies."""
    copies_LE = placement.copies_LE
    slots_LEX = np.full((*copies_LE.shape, int(copies_LE.max())), -1)
    for layer, order_P in enumerate(placement.physical_to_logical):
        for expert in range(placement.num_experts):
            slots_LEX[layer, expert, : copies_LE[layer, expert]] = np.flatnonzero(order_P == expert)
    order = placement.physical_to_logical.tolist()
    return {"phy2log": order, "log2phy": slots_LEX.tolist(), "logcnt": copies_LE.tolist()}


def _vllm_ascend(placement: Placement) -> dict[str, Any]:
    shape = (len(placement.physical_to_logical), placement.devices, placement.slots)
    layers = [
        {
            "layer_id": layer,
            "device_count": placement.devices,
            "device_list": [
                {"device_id": device, "device_expert": experts} for device, experts in enumerate(order_GS.tolist())
            ],
        }
        for layer, order_GS in enumerate(placement.physical_to_logical.reshape(shape))
    ]
    return {"moe_layer_count": len(layers), "layer_list": layers}


def _from_vllm_ascend(values: Mapping[str, Any], nodes: int) -> Placement:
    layers = sorted(values["layer_list"], key=lambda layer: layer["layer_id"])
    require(len(layers) == values["moe_layer_count"], "its moe_layer_count is not the number of its layers.")
    rows = []
    for layer in layers:
        held = sorted(layer["device_list"], key=lambda device: device["device_id"])
        require(len(held) == layer["device_count"], f"layer {layer['layer_id']} does not list all of its devices.")
        rows.append([device["device_expert"] for device in held])
    order_LGS = np.array(rows)
    require(order_LGS.ndim == 3, "its devices must hold equally many experts.")
    order_LP = _order(order_LGS.reshape(len(rows), -1))
    devices = order_LGS.shape[1]
    return Placement(physical_to_logical=order_LP, num_experts=int(order_LP.max()) + 1, devices=devices, nodes=nodes)


_WRITERS: Mapping[str, Callable[[Placement], dict[str, Any]]] = {
    "equipoise": _equipoise,
    "sglang": _sglang,
    "eplb": _eplb,
    "vllm_ascend": _vllm_ascend,
}
