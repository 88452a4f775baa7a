"""What stops a command: what a user can mend, and the user."""

import signal
from pathlib import Path


class UserError(ValueError):
    """Something the user can mend: one clear sentence that says what to do. Commands print it and exit with 2."""


def require(holds: bool, sentence: str) -> None:
    """Fails: UserError with this sentence unless ``holds``."""
    if not holds:
        raise UserError(sentence)


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved. ``signal`` is the number."""

    def __init__(self, number: int, folder: Path):
        super().__init__(f"Stopped by {signal.Signals(number).name}; the same command resumes from {folder}.")
        self.signal = number
