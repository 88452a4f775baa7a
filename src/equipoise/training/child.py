"""One training run in a process of its own, so that its peak memory is its own and a crash takes nothing along."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from equipoise.config import TrainConfig
from equipoise.errors import Interrupted, UserError
from equipoise.toml import dump
from equipoise.training.run import RESULT_FILE, signals, wait_for, write
from equipoise.training.text import Text

# On a core that others need too, OpenMP threads that spin long for each other made a step three times slower.
SHORT_SPINS = {"GOMP_SPINCOUNT": "2000"}


def finished_run(config: TrainConfig, text: Text) -> dict[str, Any]:
    """The result of a run, trained now if it is not there. Fails: UserError where it was trained on another text."""
    folder = Path(config.out)
    wait_for(folder)
    if not (folder / RESULT_FILE).exists():
        _train(config, folder)
    result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    if result["text"]["digest"] != text.digest:
        raise UserError(f"The text has changed since {folder} was trained; choose another --out, or remove the folder.")
    return result


def _train(config: TrainConfig, folder: Path) -> None:
    """Train in a process of its own; a signal to us is passed on, so that it saves its state."""
    path = folder.with_name(f"{folder.name}.toml")
    write(path, dump(config))
    command = [sys.executable, "-m", "equipoise", "train", "--config", str(path)]
    with signals() as received:
        # A process group of its own: Ctrl-C reaches us alone, and we pass it on once.
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, process_group=0, env=SHORT_SPINS | os.environ)
        while process.poll() is None and not received:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.2)
        if received:
            process.send_signal(received[0])
            process.wait()
            raise Interrupted(received[0], folder)
    if process.returncode:
        raise UserError(
            f"The run of {config.model.method}, seed {config.seed}, stopped with exit code {process.returncode} (its "
            "message is above); finished runs are kept, and the same command goes on from here."
        )
