"""Runs small enough to be repeated many times: a text of two domains, a configuration, and what two runs must share."""

import json
import random
from pathlib import Path
from typing import Any

from equipoise.config import DataConfig, ModelConfig, OptimizerConfig
from equipoise.training.loop import WEIGHTS_FILE
from equipoise.training.metrics import read
from equipoise.training.run import RESULT_FILE

LETTERS = {"verse": "aeiouthnsr  ", "sums": "0123456789+-*= "}
MODEL = {"dim": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "num_experts": 4, "top_k": 2}
SPEEDS = {"tokens_per_second", "peak_memory_bytes"}


def write_text(folder: Path) -> Path:
    """Two domains of five documents each."""
    draw = random.Random(7)
    for domain, letters in LETTERS.items():
        (folder / domain).mkdir(parents=True)
        for number in range(5):
            (folder / domain / f"{number}.txt").write_text("".join(draw.choices(letters, k=811)))
    return folder


def parts(text: Path, out: Path, *, model: dict = {}, optimizer: dict = {}, **settings: Any) -> dict[str, Any]:  # noqa: B006
    """The arguments of a configuration of a tiny run."""
    return {
        "model": ModelConfig(**{"method": "loss_free"} | MODEL | model),
        "data": DataConfig(source=str(text), seq_len=16, validation_tokens=128),
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
