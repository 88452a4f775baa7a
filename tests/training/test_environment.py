import datetime
import re
import subprocess
from pathlib import Path

import torch

import equipoise
from equipoise.training import environment as module
from equipoise.training.environment import environment


def test_names_versions_machine_and_day() -> None:
    found = environment(torch.device("cpu"), threads=3)
    assert list(found) == ["equipoise", "python", "torch", "device", "cpu", "threads", "platform", "date", "commit"]
    assert found["equipoise"] == equipoise.__version__
    assert found["torch"] == torch.__version__
    assert (found["device"], found["threads"]) == ("cpu", 3)
    assert abs(datetime.date.fromisoformat(found["date"]) - datetime.date.today()) <= datetime.timedelta(days=1)
    assert environment(torch.device("cpu"))["threads"] == torch.get_num_threads() == 1


def test_names_the_processor() -> None:
    """Under the name that the kernel gives it, where there is one."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", path.read_text(), re.M) if path.exists() else []
    assert environment()["cpu"] in names or not names
    assert environment()["cpu"].strip()


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path: Path, monkeypatch) -> None:
    """Neither that of the folder one stands in, nor that of a checkout the package merely lies in."""

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True).stdout.strip()

    copy = tmp_path / "environment.py"
    copy.write_text(Path(module.__file__).read_text())
    monkeypatch.setattr(module, "__file__", str(copy))
    assert environment()["commit"] is None
    git("init")
    git("commit", "--allow-empty", "-m", "without the file")
    assert environment()["commit"] is None
    git("add", copy.name)
    git("commit", "-m", "with it")
    assert re.fullmatch("[0-9a-f]{40}", git("rev-parse", "HEAD"))
    assert environment()["commit"] == git("rev-parse", "HEAD")
