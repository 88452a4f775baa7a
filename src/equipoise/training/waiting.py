"""The progress bar of reading and encoding text."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress


def bar() -> Progress:
    """A bar on standard error that leaves nothing behind; where that is no terminal, nothing is drawn."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)
