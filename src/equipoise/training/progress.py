"""A run's progress bar: steps, loss, tokens per second, time left."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from equipoise.training.trainer import Trainer


class Progress:
    """Shows one run on standard error, so that standard output stays for results.

    Args:
        shown: False draws nothing (other ranks).
    """

    def __init__(self, trainer: Trainer, shown: bool):
        self._trainer = trainer
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        name = f"{trainer.config.model.method}, seed {trainer.config.seed}"
        self._task = self._bar.add_task(name, total=trainer.steps, completed=trainer.done, state="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None or self._bar.console.is_terminal:
            self._bar.stop()
        else:  # only the last state would be drawn; the sentence that names the failure shall stand alone
            self._bar.live.transient = True
            self._bar.live.stop()

    def show(self, values: dict[str, float]) -> None:
        """Move on to the trainer's step; ``values`` are those of ``Trainer.step``."""
        rate = self._trainer.step_tokens / values["seconds"]
        state = f"loss {values['loss']:.3f}  max_vio {values['max_vio']:.2f}  {rate:,.0f} tokens/s"
        self._bar.update(self._task, completed=self._trainer.done, total=self._trainer.steps, state=state)
