"""``checkpoint.json`` names a checkpoint's files, so that a damaged or hostile one is found before it is read."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from equipoise.errors import UserError

NAME = "checkpoint.json"
SCHEMA = 1

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def seal(directory: Path, step: int, state: dict[str, Any]) -> None:
    """Write the manifest of all files in the directory, and bring them and it to the disk."""
    files = {file.name: {"size": file.stat().st_size, "digest": _digest(file)} for file in sorted(directory.iterdir())}
    manifest = {"schema": SCHEMA, "step": step, "state": state, "files": files}
    manifest["digest"] = _fingerprint(step, state, files)
    write(directory / NAME, json.dumps(manifest, indent=1).encode())
    sync(directory)


def verify(directory: Path) -> tuple[int, dict[str, Any]]:
    """The step and the state, after every file's size and digest was compared.

    Fails: UserError that names the file which is missing, damaged or does not belong here.
    """
    step, state, files = _read(directory / NAME)
    for name, entry in files.items():
        _verify_file(directory, name, entry)
    for file in sorted(directory.glob("*.safetensors")):
        if file.name not in files:
            raise UserError(f"{file} does not belong to the checkpoint")
    return step, state


def fit(directory: Path, layout: Layout, allow_inexact: bool) -> tuple[str, ...]:
    """Compare names, shapes and dtypes of a checkpoint's tensors with ``layout``.

    Returns: the random states that it lacks; empty unless ``allow_inexact``, which excuses those and superfluous ones.
    Fails: UserError for a tensor that is missing, superfluous or different.
    """
    stored = _layout(directory)
    excused = {name for name in layout.keys() ^ stored.keys() if allow_inexact and name.startswith("rng.")}
    missing = sorted(layout.keys() - stored.keys() - excused)
    superfluous = sorted(stored.keys() - layout.keys() - excused)
    if missing:
        raise UserError(f"{directory} lacks the tensor {missing[0]}, and {len(missing) - 1} more")
    if superfluous:
        raise UserError(
            f"{directory} has the tensor {superfluous[0]}, and {len(superfluous) - 1} more, without a place"
        )
    for name in sorted(layout.keys() & stored.keys()):
        if layout[name] != stored[name]:
            (shape, dtype), (stored_shape, stored_dtype) = layout[name], stored[name]
            raise UserError(f"{directory} has {name} as {stored_dtype} {stored_shape}, not {dtype} {shape}")
    return tuple(sorted(excused & layout.keys()))


def write(file: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync(directory: Path) -> None:
    """Wait until the disk has the directory's names."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(file: Path) -> str:
    """The file's BLAKE2b, once the disk has it."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def _fingerprint(step: int, state: dict[str, Any], files: dict[str, Any]) -> str:
    """The digest of the manifest itself."""
    return hashlib.blake2b(json.dumps([SCHEMA, step, state, files]).encode()).hexdigest()


def _read(file: Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
    if not file.is_file():
        raise UserError(f"{file} is missing")
    try:
        manifest = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged") from error
    match manifest:
        case {"schema": int(schema)} if schema > SCHEMA:
            raise UserError(f"{file} was written by a newer version of equipoise, which can read it")
        case {"schema": int(), "step": int(step), "state": dict(state), "files": dict(files), "digest": str(digest)}:
            if digest == _fingerprint(step, state, files):
                return step, state, files
    raise UserError(f"{file} is damaged")


def _verify_file(directory: Path, name: str, entry: Any) -> None:
    file = directory / name
    match entry:
        case {"size": int(size), "digest": str(digest)} if file.name == name:
            pass
        case _:
            raise UserError(f"{directory / NAME} is damaged: its entry {name!r} is not a file of the checkpoint")
    if not file.is_file():
        raise UserError(f"{file} is missing")
    if file.stat().st_size != size:
        raise UserError(f"{file} is damaged: it has {file.stat().st_size} bytes, not {size}")
    if _digest(file) != digest:
        raise UserError(f"{file} is damaged: its content is not what was saved")


def _layout(directory: Path) -> Layout:
    """Shape and dtype of every tensor in a checkpoint, whose parts must make up the whole."""
    layout = {}
    try:
        for name, entry in HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            assert sum(chunk.sizes.numel() for chunk in entry.chunks) == entry.size.numel()
            layout[name] = (tuple(entry.size), entry.properties.dtype)
    except Exception as error:  # a header that was made to mislead can make the reader raise anything
        raise UserError(f"{directory} is damaged: its tensors cannot be read ({error})") from error
    return layout
