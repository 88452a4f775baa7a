"""A run that was killed or stopped goes on as if nothing had happened, or says why it cannot."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch

from equipoise.errors import UserError
from equipoise.toml import save
from equipoise.training.loop import train
from equipoise.training.metrics import read
from equipoise.training.run import CHECKPOINTS, RESULT_FILE
from tiny_runs import STEPS, Killed, outcome, saved, stopped_before, write_text

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory) -> SimpleNamespace:
    return killed_runs(tiny, tmp_path_factory.mktemp("killed"), every=17)


def killed_runs(tiny, folder: Path, every: int) -> SimpleNamespace:
    """Runs that were killed and stopped in many places, by ``killed_runs.py``."""
    config = tiny(folder, keep=1, tensorboard=True, optimizer={"grad_accumulation": 2})
    save(config, folder / "config.toml")
    command = [sys.executable, HERE / "killed_runs.py", folder / "config.toml", folder / "runs", str(every)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(config=config, folder=folder / "runs", stops=json.loads(done.stdout), said=done.stderr)


def same_as_the_uninterrupted(killed: SimpleNamespace) -> int:
    """Compare every run with one of this process; returns how many there were."""
    here = killed.folder / "here"
    train(dataclasses.replace(killed.config, out=str(here)))
    expected = outcome(here)
    folders = [path for path in killed.folder.iterdir() if path.is_dir()]
    for folder in folders:
        found = outcome(folder)
        for part in expected:
            assert found[part] == expected[part], (folder.name, part)
    return len(folders)


def test_killed_at_any_moment_a_run_continues_bit_for_bit(killed: SimpleNamespace) -> None:
    """Also while a checkpoint is written, and a run that is killed again and again."""
    assert same_as_the_uninterrupted(killed) > 9


@pytest.mark.slow
def test_killed_at_every_single_change_of_its_folder_a_run_continues_bit_for_bit(tiny, tmp_path: Path) -> None:
    """The test before kills at one change in seventeen."""
    assert same_as_the_uninterrupted(killed_runs(tiny, tmp_path, every=1)) > 150


def test_sigint_and_sigterm_save_then_stop(killed: SimpleNamespace) -> None:
    """The resumed run is compared above."""
    assert [stop["code"] for stop in killed.stops] == [130, 143]
    for stop in killed.stops:
        assert 2 <= stop["logged"] < STEPS
        assert stop["saved"] == f"step-{stop['logged']:08d}"
    for name in ("SIGINT", "SIGTERM"):
        stopped = killed.folder / "stopped"
        assert f"equipoise: Stopped by {name}; the same command resumes from {stopped}.\n" in killed.said
    assert "Traceback" not in killed.said


def test_tensorboard_of_a_killed_run_shows_every_step_once(killed: SimpleNamespace) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("often", "stopped"):
        board = EventAccumulator(str(killed.folder / name / "tensorboard"))
        board.Reload()
        for tag in ("loss", "max_vio", "gradient_norm"):
            shown = [(event.step, event.value) for event in board.Scalars(f"train/{tag}")]
            assert shown == [(record["step"], pytest.approx(record[tag])) for record in read(killed.folder / name)]


def test_half_precision_and_half_a_log_interval_resume_bit_for_bit(interrupted, tiny, tmp_path: Path) -> None:
    config = interrupted(dtype="bf16", log_every=4)
    assert saved(config) == ["step-00000003", "step-00000006"]
    train(config)
    train(tiny(tmp_path / "alone", dtype="bf16", log_every=4))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "alone")


@pytest.mark.parametrize("method", ["quantile", "global_batch"])
def test_other_state_resumes_bit_for_bit(interrupted, tiny, tmp_path: Path, method: str) -> None:
    train(interrupted(model={"method": method}))
    train(tiny(tmp_path / "alone", model={"method": method}))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "alone")


def test_a_changed_sparsity_resumes_bit_for_bit(interrupted, tiny, tmp_path: Path) -> None:
    """K changes in the sixth step, before the checkpoint."""
    model = {"sparsity": ("0:2", "5:1")}
    train(interrupted(model=model))
    train(tiny(tmp_path / "alone", model=model))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "alone")


def test_what_does_not_touch_the_numbers_may_change_on_resuming(interrupted, alone: Path, tmp_path: Path) -> None:
    config = interrupted()
    train(dataclasses.replace(config, checkpoint_every=1, keep=1, log_every=1))
    assert outcome(tmp_path / "run") == outcome(alone)
    assert saved(config) == ["step-00000008"]
    seconds = sum(64 / record["tokens_per_second"] for record in read(tmp_path / "run"))
    assert train(config)["tokens_per_second"] == pytest.approx(STEPS * 64 / seconds)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert train(dataclasses.replace(config, out=str(moved)))["steps"] == STEPS


def test_another_configuration_is_refused_and_the_run_kept(interrupted, alone: Path, tmp_path: Path) -> None:
    config = interrupted()
    with pytest.raises(UserError, match=r"results of another configuration \(optimizer.batch_size, steps\)"):
        train(dataclasses.replace(config, steps=10, optimizer=dataclasses.replace(config.optimizer, batch_size=8)))
    train(config)
    assert outcome(tmp_path / "run") == outcome(alone)


def test_another_thread_count_is_refused_unless_allowed(interrupted, alone: Path, tmp_path: Path) -> None:
    config = interrupted()
    two = dataclasses.replace(config, threads=2)
    try:
        with pytest.raises(UserError, match=r"cannot continue bit for bit: threads was 1 and is 2\. Resume it"):
            train(two)
        train(dataclasses.replace(two, allow_inexact=True))
    finally:
        torch.set_num_threads(1)
    mine, theirs = outcome(tmp_path / "run"), outcome(alone)
    assert [point["loss"] for point in mine["metrics"]] == pytest.approx([point["loss"] for point in theirs["metrics"]])


def test_another_text_under_the_same_name_is_refused(tiny, tmp_path: Path) -> None:
    data = write_text(tmp_path / "text")
    config = tiny(tmp_path / "run", data={"source": str(data)})
    with pytest.raises(Killed), stopped_before(8):
        train(config)
    (data / "verse" / "0.txt").write_text((data / "verse" / "0.txt").read_text().swapcase())
    with pytest.raises(UserError, match=r"cannot continue bit for bit: text was '[0-9a-f]{16}' and is '[0-9a-f]{16}'"):
        train(config)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_taken_when_told(
    interrupted, alone: Path, tmp_path: Path
) -> None:
    config = interrupted()
    file = next(Path(config.out, CHECKPOINTS, "step-00000006").glob("*.safetensors"))
    whole = file.read_bytes()
    for damaged in (whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"step-00000006/.* is damaged: .*; --allow-previous takes the one before"):
            train(config)
    assert saved(config) == ["step-00000003", "step-00000006"]
    train(dataclasses.replace(config, allow_previous=True))
    assert outcome(tmp_path / "run") == outcome(alone)


def test_a_stream_resumes_bit_for_bit(tiny, tmp_path: Path, monkeypatch) -> None:
    """Its position is not a function of the step, and comes from the checkpoint."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows").mkdir()
    rows = ({"text": f"row {number} {'very ' * (number % 7)}long", "domain": "ab"[number % 2]} for number in range(301))
    (tmp_path / "rows" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": f"hf:{tmp_path / 'rows'}"}
    killed, alone = (tiny(tmp_path / name, data=data) for name in ("killed", "alone"))
    with pytest.raises(Killed), stopped_before(8):
        train(killed)
    train(killed)
    train(alone)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "alone")
    assert set(json.loads((tmp_path / "alone" / RESULT_FILE).read_text())["per_layer"][0]["domain_load"]) == {"a", "b"}
