"""A trace on disk: a directory of ``trace.json`` and safetensors shards, which the former names with size and digest.

Nothing is unpickled, and no more is read than the shards hold: what ``trace.json`` claims is compared with them first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from equipoise.diagnosis.trace import Trace
from equipoise.errors import UserError, require

NAME = "trace.json"
FORMAT = "equipoise-trace"
SCHEMA = 1
DTYPES = ("int16", "int32", "int64", "float32", "float64")


def write_trace(trace: Trace, path: str | Path, shard_bytes: int = 2**28) -> None:
    """Write a trace as a new directory; it appears under its name once it is whole.

    Args:
        trace: what to write.
        path: a directory that does not exist.
        shard_bytes: size at which the next file begins; an array is cut along its first axis.
    Fails: UserError if the path exists, or cannot be written; nothing is left of it then.
    """
    target = Path(path)
    require(not target.exists(), f"{target} exists; give the trace another name, or remove it.")
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".tmp-{target.name}-", dir=target.parent))
        files = {}
        for number, shard in enumerate(_shards(trace, shard_bytes)):
            name, data = f"shard-{number:05d}.safetensors", save(shard)
            _write(partial / name, data)
            files[name] = {"size": len(data), "digest": hashlib.sha256(data).hexdigest()}
        _write(partial / NAME, json.dumps(_description(trace) | {"files": files}, indent=1).encode())
        partial.chmod(0o755)
        partial.rename(target)
    except OSError as error:
        raise UserError(f"Cannot write the trace {target}: {error.strerror}; choose another place.") from error
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial)


def read_trace(path: str | Path) -> Trace:
    """Read a trace, after every file's size and digest was compared.

    Fails: UserError that names the file which is missing, damaged, or of another format or schema.
    """
    folder = Path(path)
    about = read_json(folder / NAME)
    known = isinstance(about, dict) and about.get("format") == FORMAT
    require(known, f"{folder / NAME} does not describe a trace; point to one that Equipoise wrote.")
    version = about.get("schema")
    require(version == SCHEMA, f"{folder} has trace schema {version!r}, this version reads {SCHEMA}; record it anew.")
    try:
        pieces = _pieces(folder, about["files"])
        arrays = {name: _join(folder, name, entry, pieces) for name, entry in about["arrays"].items()}
        facts = {name: about[name] for name in ("top_k", "expert_bytes", "about")}
        named = all(isinstance(name, str) for name in [*about["layers"], *about["domains"]])
        require(named and isinstance(about["about"], dict), f"{NAME} holds names that are none; record it anew.")
        return Trace(**arrays, **facts, layers=tuple(about["layers"]), domains=tuple(about["domains"]))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except OSError as error:
        raise UserError(f"Cannot read the trace {folder}: {error.strerror}; record it anew.") from error
    except Exception as error:  # a hostile description may be wrong in any way; none may pass as a trace
        raise UserError(f"{folder / NAME} is damaged ({type(error).__name__}); record it anew.") from error


def read_json(path: Path) -> Any:
    """The values of a JSON file.

    Fails: UserError if it cannot be read or is not JSON (NaN and infinity are not).
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}; check the path.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); it may be truncated, write it anew.") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _description(trace: Trace) -> dict[str, Any]:
    arrays = {name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in trace.arrays().items()}
    facts = {"layers": trace.layers, "domains": trace.domains, "about": dict(trace.about)}
    sizes = {"top_k": trace.top_k, "expert_bytes": trace.expert_bytes}
    return {"format": FORMAT, "schema": SCHEMA} | facts | sizes | {"arrays": arrays}


def _shards(trace: Trace, shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    """Pieces ``name/number`` of the arrays, in files of about this size."""
    shard: dict[str, np.ndarray] = {}
    for name, array in trace.arrays().items():
        require(str(array.dtype) in DTYPES, f"A trace's {name} must be one of {', '.join(DTYPES)}, not {array.dtype}.")
        rows = max(1, shard_bytes * len(array) // max(1, array.nbytes))
        for number, start in enumerate(range(0, max(1, len(array)), rows)):
            shard[f"{name}/{number}"] = np.ascontiguousarray(array[start : start + rows])
            if sum(piece.nbytes for piece in shard.values()) >= shard_bytes:
                yield shard
                shard = {}
    if shard:
        yield shard


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _pieces(folder: Path, files: dict[str, Any]) -> dict[str, np.ndarray]:
    pieces: dict[str, np.ndarray] = {}
    for name, entry in files.items():
        require(name == Path(name).name, f"{name} is not a file of the trace")
        file = folder / name
        require(file.is_file(), f"{name} is missing; copy it from where the trace was recorded.")
        size = file.stat().st_size
        require(size == entry["size"], f"{name} has {size} bytes instead of {entry['size']}; copy it anew.")
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        require(digest == entry["digest"], f"{name} was changed after it was written; copy it anew.")
        try:
            with safe_open(file, framework="numpy") as shard:
                pieces |= {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise UserError(f"{name} is not a safetensors file ({error}).") from error
    return pieces


def _join(folder: Path, name: str, entry: dict[str, Any], pieces: dict[str, np.ndarray]) -> np.ndarray:
    parts = []
    while f"{name}/{len(parts)}" in pieces:
        parts.append(pieces[f"{name}/{len(parts)}"])
    require(bool(parts), f"{NAME} names {name}, which no shard holds; copy the shards anew.")
    array = np.concatenate(parts)
    found = [list(array.shape), str(array.dtype)]
    require(found == [entry["shape"], entry["dtype"]], f"{name} has shape and dtype {found}, unlike in {NAME}.")
    return array
