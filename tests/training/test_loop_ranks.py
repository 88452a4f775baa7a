"""Two ranks under torchrun."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from equipoise.errors import UserError
from equipoise.toml import save
from equipoise.training.loop import train
from equipoise.training.metrics import read
from equipoise.training.run import RESULT_FILE
from equipoise.training.sampling import load_run
from equipoise.training.text import read_text
from tiny_runs import outcome

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tiny, tmp_path_factory) -> SimpleNamespace:
    """Two processes under torchrun: a run, one that is stopped and resumed there, and what each rank saw."""
    folder = tmp_path_factory.mktemp("ranks")
    config = tiny(folder, model={"method": "global_batch"}, optimizer={"grad_accumulation": 2})
    save(config, folder / "config.toml")
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node=2"]
    command += [HERE / "ranks_runs.py", folder / "config.toml", folder]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    seen = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return SimpleNamespace(config=config, folder=folder, seen=seen)


def test_two_ranks_equal_one_process(ranks: SimpleNamespace, tmp_path: Path) -> None:
    """Each rank and micro-batch has one sequence of the four; one process has the ranks' two together."""
    result = train(dataclasses.replace(ranks.config, out=str(tmp_path)))
    theirs = json.loads((ranks.folder / "alone" / RESULT_FILE).read_text())
    assert (theirs["flops"], theirs["tokens"]) == (result["flops"], result["tokens"])
    for mine, its in zip(read(tmp_path), read(ranks.folder / "alone")):
        for key in ("loss", "gradient_norm", "max_vio"):
            assert its[key] == pytest.approx(mine[key], rel=1e-4)
        for layer in mine["layers"]:
            assert its["layers"][layer]["load"] == mine["layers"][layer]["load"]
            assert its["layers"][layer]["loss"] == pytest.approx(mine["layers"][layer]["loss"], rel=1e-4)
    assert theirs["loss"] == pytest.approx(result["loss"], rel=1e-5)
    one, two = (load_run(folder)[0].state_dict() for folder in (tmp_path, ranks.folder / "alone"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)


def test_ranks_see_their_own_share_and_hold_the_same_weights(ranks: SimpleNamespace) -> None:
    zero, one = ranks.seen
    assert zero["weights"] == one["weights"]
    assert zero["tokens"] != one["tokens"]
    data = read_text(ranks.config.data, ranks.config.optimizer, seed=0)
    batch, _ = data.train.batch(0)
    both = [row for micro in range(2) for seen in (zero, one) for row in seen["tokens"][micro]]
    assert both == batch.tolist()


def test_ranks_stop_together_and_resume_bit_for_bit(ranks: SimpleNamespace) -> None:
    """The signal reaches only the second rank."""
    assert [seen["stopped"] for seen in ranks.seen] == ["Stopped by SIGTERM"] * 2
    assert [seen["saved"] for seen in ranks.seen] == ["step-00000005"] * 2
    assert outcome(ranks.folder / "stopped") == outcome(ranks.folder / "alone")


def test_a_run_of_two_ranks_goes_on_with_one_only_when_told(ranks: SimpleNamespace, tmp_path: Path) -> None:
    config = dataclasses.replace(ranks.config, out=str(ranks.folder / "left"))
    with pytest.raises(UserError, match=r"lacks|without a place|ranks was 2 and is 1"):
        train(config)
    result = train(dataclasses.replace(config, allow_inexact=True))
    theirs = json.loads((ranks.folder / "alone" / RESULT_FILE).read_text())
    assert result["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
