"""What a run tells while it runs: one JSON line per log step, and the same for TensorBoard."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from equipoise.balancing.load_stats import LoadStats
from equipoise.errors import UserError
from equipoise.training.run import write

FILE = "metrics.jsonl"


class Metrics:
    """Writes the records of a run, and forgets those that a resumed run is about to repeat.

    Args:
        folder: of the run.
        step: the step the run starts from; records of later steps are removed.
        tensorboard: also write event files.
    Fails: UserError where TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool):
        self._board = _summary_writer(folder / "tensorboard", step) if tensorboard else None
        path = folder / FILE
        write(path, "".join(json.dumps(record) + "\n" for record in read(folder) if record["step"] <= step))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any], layers: dict[str, LoadStats]) -> None:
        """Add one record; ``layers`` joins it as ``"layers"``."""
        detail = {name: _detail(stats) for name, stats in layers.items()}
        self._file.write(json.dumps(record | {"layers": detail}) + "\n")
        self._file.flush()
        if self._board is None:
            return
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(f"train/{name}", value, record["step"])
        for layer, values in detail.items():
            for name in ("max_vio", "cv", "entropy", "dead", "dropped"):
                self._board.add_scalar(f"{name}/{layer}", values[name], record["step"])
            for name, value in (values["loss"] | values["readings"]).items():
                self._board.add_scalar(f"{name}/{layer}", value, record["step"])
        self._board.flush()  # else a kill takes what the writer still holds

    def close(self) -> None:
        """Let go of the files, to which every record has been written."""
        with contextlib.suppress(OSError):  # what cannot be written now has failed in ``write`` before
            self._file.close()
        if self._board is not None:
            self._board.close()


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of a run in order; a last line that a kill cut short is left out."""
    path = folder / FILE
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _detail(stats: LoadStats) -> dict[str, Any]:
    return {
        "load": stats.load.tolist(),
        "max_vio": stats.max_vio,
        "cv": stats.cv,
        "entropy": stats.entropy,
        "dead": stats.dead,
        "dropped": stats.dropped,
        "loss": stats.loss,
        "weighted_loss": stats.weighted_loss,
        "nulls": stats.nulls,
        "readings": stats.readings,
    }


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "TensorBoard is not installed: pip install 'equipoise[report]', or train with --no-tensorboard."
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)
