"""Where a figure was measured."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import equipoise


def environment(device: torch.device | None = None, threads: int | None = None) -> dict[str, Any]:
    """Versions, machine, date, and the commit where the package runs from a checkout.

    Args:
        device: that computed; None for a GPU where there is one.
        threads: CPU threads that computed; None for this process's own number.
    """
    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    return {
        "equipoise": equipoise.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cpu": _cpu(),
        "threads": threads or torch.get_num_threads(),
        "platform": platform.platform(),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }


def _cpu() -> str:
    """The processor's name; Linux keeps it in a file of its own."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """HEAD of the checkout that this file is tracked in; None where it was installed from elsewhere."""
    path = Path(__file__)
    try:
        _git(path.parent, "ls-files", "--error-unmatch", path.name)
        return _git(path.parent, "rev-parse", "HEAD").strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout
