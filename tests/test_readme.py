"""Every command of the README runs: as written, made small by flags that override the written ones."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from equipoise.config import CompareConfig
from equipoise.scaling import Surface, grid_of
from equipoise.toml import load

ROOT = Path(__file__).parent.parent
MODEL = "--dim 16 --num-heads 2 --num-layers 1 --hidden-dim 16 --num-experts 4 --seq-len 16 --batch-size 4"
TORCH_FREE = ["scaling-law", "place", "simulate", "replay-requests"]
SMALL = {
    "compare": f"{MODEL} --validation-tokens 256 --flops 2e7 --seeds 1 --threads 1",
    "train": f"{MODEL} --validation-tokens 256 --steps 3 --threads 1",
    "generate": "--tokens 5",
    "methods": "",
    "scaling-law": "--bootstraps 20",
    "place": "",
    "simulate": "",
    "replay-requests": "--num-requests 200",
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    return [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def shrink(words: list[str], flags: str) -> list[str]:
    """The words with these flags instead of their own."""
    small = shlex.split(flags)
    replaced = {*small, "--minutes"}  # --flops takes its place
    kept, dropping = [], False
    for word in words:
        dropping = word in replaced if word.startswith("--") else dropping
        kept += [] if dropping else [word]
    return kept + small


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_equipoise_commands_run_in_the_order_of_the_readme(tmp_path: Path) -> None:
    """Twenty processes' worth of imports: slow, but the commands depend on one another."""
    for domain in ("verse", "prose"):
        folder = tmp_path / "my_texts" / domain
        folder.mkdir(parents=True)
        lines = [
            f"{domain} {number}: {number * 7919 % 1009} tokens went to {number % 13} experts" for number in range(999)
        ]
        (folder / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    np.save(tmp_path / "loads.npy", np.random.default_rng(0).integers(1, 100, (3, 16)))
    grid = grid_of(Surface(1.69, 406.4, 410.7, 0.34, 0.28), [1e15, 1e16, 1e17], points=5, width=4.0)
    rows = "".join(f"{n},{d},{value}\n" for n, d, value in zip(grid.params, grid.tokens, grid.loss))
    (tmp_path / "runs.csv").write_text(f"params,tokens,loss\n{rows}")
    seen = []
    for command in commands():
        words = shlex.split(command)
        if "equipoise" not in words:
            continue
        verb = words[words.index("equipoise") + 1]
        done = run(shrink(words, SMALL[verb]), tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        seen.append(verb)
    assert seen == ["compare", "train", "train", "generate", "compare", "methods", *TORCH_FREE]
    assert (tmp_path / "runs/mine/report.html").stat().st_size > 1_000_000


def test_make_targets_of_the_readme_exist_and_the_demo_is_the_promised_one() -> None:
    targets = [command.split()[1] for command in commands() if command.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0
    demo = load(CompareConfig, ROOT / "examples/demo.toml")
    demo.check()
    assert len(demo.methods) >= 5
    assert demo.minutes is not None
    assert demo.minutes < 5
    assert demo.seeds == 1
