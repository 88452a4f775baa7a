"""Trains under torchrun: in FOLDER/alone to the end; in FOLDER/stopped until rank 1 gets SIGTERM before its fifth step,
then to the end; in FOLDER/left until then only. Each rank writes what it saw into FOLDER/rank<n>.json.

    torchrun ranks_runs.py CONFIG FOLDER
"""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from equipoise.config import TrainConfig
from equipoise.errors import Interrupted
from equipoise.toml import load
from equipoise.training import checkpoint
from equipoise.training.loop import train
from equipoise.training.run import CHECKPOINTS
from equipoise.training.trainer import Trainer

RANK = int(os.environ["RANK"])


def main(config: TrainConfig, folder: Path) -> None:
    """What the top of this file says."""
    seen: dict = {}
    plain = Trainer.step

    def watched(self: Trainer) -> dict[str, float]:
        if self.done == 0:
            seen["tokens"] = [self.text.train.batch(0, micro, 2, RANK, 2)[0].tolist() for micro in range(2)]
        if self.done == 4 and RANK == 1 and "stopped" in self.config.out and "stopped" not in seen:
            os.kill(os.getpid(), signal.SIGTERM)
        values = plain(self)
        seen["weights"] = [weight.detach().double().sum().item() for weight in self.model.parameters()]
        return values

    Trainer.step = watched
    dist.init_process_group("gloo")
    train(replace(config, out=str(folder / "alone")))
    stopped = replace(config, out=str(folder / "stopped"))
    try:
        train(stopped)
    except Interrupted as stop:
        seen["stopped"] = str(stop).partition(";")[0]
    seen["saved"] = checkpoint.latest(folder / "stopped" / CHECKPOINTS).name
    if RANK == 0:
        shutil.copytree(folder / "stopped", folder / "left")
    train(stopped)
    dist.destroy_process_group()
    (folder / f"rank{RANK}.json").write_text(json.dumps(seen))


main(load(TrainConfig, sys.argv[1]), Path(sys.argv[2]))
