"""Where things that take seconds to build are kept between runs: plain files that may be deleted at any time."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from equipoise.errors import UserError


def folder() -> Path:
    """The cache folder: ``$XDG_CACHE_HOME/equipoise``, or ``~/.cache/equipoise``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "equipoise"


def write(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that nobody ever reads half of it.

    Fails: UserError where the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(
            f"The folder {path.parent} cannot be written ({error.strerror}); "
            "set XDG_CACHE_HOME to a folder that can, with a few megabytes to spare."
        ) from error
