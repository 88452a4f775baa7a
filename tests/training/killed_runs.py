"""Trains in processes that are killed. A program of its own, since only a process without threads may fork.

    python killed_runs.py CONFIG FOLDER EVERY

kills one run of the configuration each time it is about to change its folder for the 1st, EVERY-th, 2 * EVERY-th ...
time, in FOLDER/1, FOLDER/EVERY ...; one after ever longer times, in FOLDER/often; and stops one by SIGINT and SIGTERM,
in FOLDER/stopped. Each run is then resumed to its end. Prints what became of the stopped one, as JSON.
"""

import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch.utils.tensorboard  # noqa: F401 - once, before all forks

from equipoise import cli
from equipoise.config import TrainConfig
from equipoise.toml import load, save
from equipoise.training import checkpoint
from equipoise.training.loop import train
from equipoise.training.metrics import read
from equipoise.training.run import CHECKPOINTS

CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove"}


def forked(work: Callable[[], int | None]) -> int:
    """Start work in a process of its own, whose exit code is the work's answer; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(work() or 0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(child: int) -> int:
    """The exit code of a process, negative where a signal killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def on_change(folder: Path, act: Callable[[int], None]) -> None:
    """From now on, tell the number of each change of a folder just before it happens."""
    numbers = itertools.count(1)

    def hook(event: str, arguments: tuple) -> None:
        writes = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT)
        if writes and str(folder) in str(arguments[0]):
            act(next(numbers))

    sys.addaudithook(hook)


def changes(config: TrainConfig) -> int:
    """How often a run changes its folder."""
    reader, writer = os.pipe()

    def work() -> None:
        on_change(Path(config.out), lambda _: os.write(writer, b"."))
        train(config)

    assert ended(forked(work)) == 0
    os.close(writer)
    return len(os.read(reader, 10_000))


def kill_at(config: TrainConfig, fatal: int) -> None:
    """Kill a run at the change of this number, and resume it."""

    def work() -> None:
        on_change(Path(config.out), lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == fatal else None)
        train(config)

    assert ended(forked(work)) == -signal.SIGKILL
    assert ended(forked(lambda: train(config) and None)) == 0


def kill_often(config: TrainConfig) -> None:
    """Kill a run after 50 ms, resume and kill it after 100 ms, and so on until it ends first."""
    for times in itertools.count(1):
        child = forked(lambda: train(config) and None)
        time.sleep(times / 20)
        os.kill(child, signal.SIGKILL)
        if ended(child) == 0:
            return


def stop(config: TrainConfig, path: Path) -> list[dict]:
    """Stop a run by SIGINT, and by two SIGTERM, at a step of its own choice, and resume it; all as commands."""
    save(config, path)
    stops = []
    for number, times in ((signal.SIGINT, 1), (signal.SIGTERM, 2)):
        logged = len(list(read(Path(config.out))))
        child = forked(lambda: cli.main(["train", "--config", str(path)]))
        while len(list(read(Path(config.out)))) < logged + 2:
            time.sleep(0.002)
        for _ in range(times):
            os.kill(child, number)
        code = ended(child)
        *_, last = read(Path(config.out))
        saved = checkpoint.latest(Path(config.out, CHECKPOINTS))
        stops.append({"code": code, "logged": last["step"], "saved": saved.name})
    assert ended(forked(lambda: cli.main(["train", "--config", str(path)]))) == 0
    return stops


def main(config: TrainConfig, folder: Path, every: int) -> None:
    """What the top of this file says."""
    folder.mkdir()  # else the first run would make one folder more than the others
    count = changes(replace(config, out=str(folder / "alone")))
    for fatal in [1, *range(every, count + 1, every)]:
        kill_at(replace(config, out=str(folder / f"{fatal}")), fatal)
    kill_often(replace(config, out=str(folder / "often")))
    print(json.dumps(stop(replace(config, out=str(folder / "stopped")), folder / "stopped.toml")))


main(load(TrainConfig, sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
