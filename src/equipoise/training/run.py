"""A run's surroundings: its folder, its device and ranks, and what decides whether a resume is exact."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import signal
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from equipoise.config import TrainConfig, dump, load, to_dict
from equipoise.contracts import UserError

CONFIG_FILE = "config.toml"
RESULT_FILE = "result.json"

# What may differ when a folder is taken up again: it decides neither the model nor the numbers of the run.
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


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved. ``signal`` is the number."""

    def __init__(self, number: int, folder: Path):
        super().__init__(f"Stopped by {signal.Signals(number).name}; the same command resumes from {folder}.")
        self.signal = number


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
    """Join torchrun's ranks where there are some. Fails: UserError for CUDA that is not there."""
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise UserError("device='cuda', but torch finds no CUDA device; use device='cpu' or 'auto'.")
    kind = "cuda" if cuda and config.device != "cpu" else "cpu"
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
    if size == 1:
        yield World(0, 1, device)
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def precision(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """The autocast context of the run's dtype."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bf16")


def fingerprint(config: TrainConfig, ranks: World) -> dict[str, Any]:
    """What must be equal for a resumed run to continue bit for bit."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu",
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "ranks": ranks.size,
        "dtype": config.dtype,
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
def claim(folder: Path, config: TrainConfig) -> Iterator[None]:
    """Hold a result folder: write the configuration, or find the same one there.

    Fails: UserError where the folder holds another configuration, or another process trains in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"Another process is training in {folder}; wait for it, or choose another --out."
            ) from error
        _write_or_compare(folder, config)
        yield


def _write_or_compare(folder: Path, config: TrainConfig) -> None:
    path = folder / CONFIG_FILE
    if path.exists():
        differing = sorted(differences(to_dict(load(TrainConfig, path)), to_dict(config)) - FREE)
        if differing:
            raise UserError(
                f"{folder} holds a run with another configuration ({', '.join(differing)}); choose another --out, or "
                "remove the folder."
            )
        return
    path.write_text(dump(config), encoding="utf-8")


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
    """Collect SIGINT and SIGTERM instead of dying of them; a second one of a kind acts as usual."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: types.FrameType | None) -> None:
        received.append(number)
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
