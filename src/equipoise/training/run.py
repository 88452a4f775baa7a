"""A run's surroundings: its folder, its device and ranks, and what decides whether a resume is exact."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import signal
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from rich.console import Console

from equipoise.config import RunConfig, TrainConfig
from equipoise.errors import Interrupted, UserError
from equipoise.toml import dump, load, to_dict

CONFIG_FILE = "config.toml"
RESULT_FILE = "result.json"
CHECKPOINTS = "checkpoints"
RUNS = "runs"  # in the folder of a comparison

# What a file system answers where something cannot be written; other errors of this kind come from the network.
FILE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST}
FILE_ERRORS |= {errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.EIO}

# What may differ when a run is taken up again: it decides neither the model nor the numbers.
FREE = {
    "log_every",
    "checkpoint_every",
    "keep",
    "tensorboard",
    "allow_inexact",
    "allow_previous",
    "out",
    "threads",
    "device",
}


@dataclass(frozen=True)
class World:
    """The ranks of a run: one, or those that torchrun started.

    Attributes:
        rank, size: this process and their number.
        device: where this rank trains.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0


@contextlib.contextmanager
def world(config: TrainConfig) -> Iterator[World]:
    """Join torchrun's ranks, unless the caller has done so. Fails: UserError for CUDA that is not there."""
    device = choose_device(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL puts what it sends
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, device)
        return
    joined = dist.is_initialized()
    if not joined:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        with _together():
            yield World(dist.get_rank(), size, device)
    finally:
        if not joined:
            dist.destroy_process_group()


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Leave with all ranks, at the end and on a signal: one that leaves early aborts the others' gloo threads."""
    try:
        yield
    except Interrupted:
        dist.barrier()
        raise
    dist.barrier()


def choose_device(config: RunConfig) -> torch.device:
    """Where this process trains. Fails: UserError for CUDA that is not there."""
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise UserError("device='cuda', but torch finds no CUDA device; use device='cpu' or 'auto'.")
    if cuda and config.device != "cpu":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def precision(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """The autocast context of the run's dtype."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bf16")


def fingerprint(config: TrainConfig, ranks: World, text: str) -> dict[str, Any]:
    """What must be equal for a resumed run to continue bit for bit; ``text`` is the digest of the text."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu",
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "ranks": ranks.size,
        "dtype": config.dtype,
        "text": text,
    }


def refuse_inexact(saved: dict[str, Any], here: dict[str, Any], allowed: bool) -> None:
    """Fails: UserError where the run would go on with other numbers than it would have had, unless that is allowed."""
    different = [f"{key} was {saved.get(key)!r} and is {here[key]!r}" for key in here if saved.get(key) != here[key]]
    if different and not allowed:
        raise UserError(
            f"The run cannot continue bit for bit: {'; '.join(different)}. Resume it where it ran, or pass "
            "--allow-inexact."
        )


@contextlib.contextmanager
def claim(folder: Path, config: RunConfig, free: set[str]) -> Iterator[bool]:
    """Hold a result folder, and write the configuration into it. Yields whether the folder held the same one before.

    A start that came to nothing, because of a wrong setting or text, keeps nobody from another configuration.

    Args:
        free: dotted keys that may differ from the configuration that the folder holds.
    Fails: UserError where the folder holds results of another configuration, where another process works in it, or
        where something, here or within the ``with``, cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            _lock(lock, folder)
            resumes = _resumes(folder, config, free)
            write(folder / CONFIG_FILE, dump(config))
            yield resumes
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise
        raise UserError(
            f"Cannot write {error.filename or f'to {folder}'} ({error.strerror}); make room or choose another --out: "
            "what was saved before is kept."
        ) from error


def wait_for(folder: Path) -> None:
    """Wait until nobody works in a folder: a comparison that was killed leaves a run behind, which goes on alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock, Console(stderr=True).status(f"Waiting for the run in {folder}"):
        fcntl.flock(lock, fcntl.LOCK_EX)


def _lock(lock: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"Another process is working in {folder}; wait for it, or choose another --out.") from error


def _resumes(folder: Path, config: RunConfig, free: set[str]) -> bool:
    path = folder / CONFIG_FILE
    if not path.exists():
        return False
    differing = sorted(differences(to_dict(load(type(config), path)), to_dict(config)) - free)
    if differing and _holds_results(folder):
        raise UserError(
            f"{folder} holds results of another configuration ({', '.join(differing)}); choose another --out, or "
            "remove the folder."
        )
    return not differing


def _holds_results(folder: Path) -> bool:
    """Whether a run or a comparison has come to anything that can be taken up again."""
    results = (RESULT_FILE, f"{CHECKPOINTS}/step-*")
    return any(any(folder.glob(f"{start}{name}")) for start in ("", f"{RUNS}/*/") for name in results)


def write(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader finds the whole file or none."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON; as ``write``."""
    write(path, json.dumps(value, indent=1, allow_nan=False))


def differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> set[str]:
    """The dotted keys in which two configurations differ."""
    found: set[str] = set()
    for key in one.keys() | other.keys():
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.add(f"{prefix}{key}")
    return found


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second SIGINT, of somebody impatient, acts as usual."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: types.FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:  # a second SIGTERM is the first once more, sent to all and passed on by torchrun
            signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agreed_stop(received: list[int], ranks: World) -> int | None:
    """The signal that any rank received, the same answer on all of them, so that all stop after the same step."""
    number = received[0] if received else 0
    if ranks.size > 1:
        tensor = torch.tensor(number, device=ranks.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        number = int(tensor)
    return number or None
