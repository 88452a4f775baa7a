"""Runs small enough to be repeated many times: a text of two domains, a configuration, and what two runs must share."""

import json
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from equipoise.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from equipoise.training.loop import WEIGHTS_FILE
from equipoise.training.metrics import read
from equipoise.training.run import CHECKPOINTS, RESULT_FILE
from equipoise.training.trainer import Trainer

LETTERS = {"verse": "aeiouthnsr  ", "sums": "0123456789+-*= "}
MODEL = {"dim": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "num_experts": 4, "top_k": 2}
STEPS = 9
STEP_FLOPS = 3_981_312  # as test_trainer counts them
SPEEDS = {"tokens_per_second", "peak_memory_bytes"}


def write_text(folder: Path) -> Path:
    """Two domains of five documents each."""
    draw = random.Random(7)
    for domain, letters in LETTERS.items():
        (folder / domain).mkdir(parents=True)
        for number in range(5):
            (folder / domain / f"{number}.txt").write_text("".join(draw.choices(letters, k=811)))
    return folder


def parts(text: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """The arguments of a tiny run's configuration; ``model``, ``data`` and ``optimizer`` are given as dicts."""
    model, data, optimizer = (settings.pop(name, {}) for name in ("model", "data", "optimizer"))
    return {
        "model": ModelConfig(**{"method": "loss_free"} | MODEL | model),
        "data": DataConfig(**{"source": str(text), "seq_len": 16, "validation_tokens": 128} | data),
        "optimizer": OptimizerConfig(**{"batch_size": 4} | optimizer),
        "out": str(out),
        "threads": 1,
    } | settings


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind but its speeds and its memory: the weights to the bit, the metrics, the result."""
    result = json.loads((folder / RESULT_FILE).read_text())
    return {
        "weights": (folder / WEIGHTS_FILE).read_bytes(),
        "metrics": [_without_speeds(record) for record in read(folder)],
        "result": _without_speeds(result),
    }


def _without_speeds(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in SPEEDS}


def saved(config: TrainConfig) -> list[str]:
    """The names of a run's checkpoints."""
    return sorted(path.name for path in Path(config.out, CHECKPOINTS).iterdir())


class Killed(BaseException):
    """Stands for a kill that leaves no time to save."""


@contextmanager
def stopped_before(step: int, act: Callable[[Trainer], None] | None = None) -> Iterator[None]:
    """Let the trainer's step of this number act before it begins, or else raise ``Killed``."""
    plain = Trainer.step

    def mortal(self: Trainer) -> dict[str, float]:
        if self.done + 1 == step:
            if act is None:
                raise Killed
            act(self)
        return plain(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", mortal)
        yield


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The disk is full: no file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
