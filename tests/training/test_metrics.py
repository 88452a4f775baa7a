import builtins
import json
import math
from pathlib import Path

import pytest
import torch

from equipoise.balancing.load_stats import LoadStats
from equipoise.errors import UserError
from equipoise.training.metrics import FILE, Metrics, read

LAYERS = {
    "layers.0.moe": LoadStats.of(torch.tensor([3, 0, 1]), dropped=2, loss={"balance_loss": (1.5, 0.015)}),
    "layers.1.moe": LoadStats.of(torch.tensor([1, 1, 1])),
}


def record(step: int) -> dict:
    return {"step": step, "loss": step / 3, "max_vio": 0.1 * step}


def write(folder: Path, *steps: int, start: int = 0, tensorboard: bool = False) -> None:
    metrics = Metrics(folder, start, tensorboard)
    for step in steps:
        metrics.write(record(step), LAYERS)
    metrics.close()


def test_a_line_per_record_with_every_layer(tmp_path: Path) -> None:
    write(tmp_path, 2, 4)
    lines = (tmp_path / FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(read(tmp_path))
    first, second = read(tmp_path)
    assert first["layers"]["layers.0.moe"] == {
        "load": [3, 0, 1],
        "max_vio": 1.25,
        "cv": pytest.approx(math.sqrt(14 / 9) / (4 / 3)),
        "entropy": pytest.approx((0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(3)),
        "dead": 1,
        "dropped": 2,
        "loss": {"balance_loss": 1.5},
        "weighted_loss": {"balance_loss": 0.015},
        "nulls": 0.0,
        "readings": {},
    }
    assert first["layers"]["layers.1.moe"]["load"] == [1, 1, 1]
    assert {key: second[key] for key in ("step", "loss", "max_vio")} == record(4)


def test_records_are_on_the_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0, tensorboard=True)
    metrics.write(record(1), LAYERS)
    assert [found["step"] for found in read(tmp_path)] == [1]
    assert [event.step for event in events(tmp_path)["train/loss"]] == [1]
    metrics.close()


def test_a_resumed_run_forgets_what_it_is_about_to_repeat(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4)
    write(tmp_path, 3, 4, 5, start=2)
    assert [found["step"] for found in read(tmp_path)] == [1, 2, 3, 4, 5]
    write(tmp_path, start=0)
    assert list(read(tmp_path)) == []


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    whole = (tmp_path / FILE).read_text()
    for cut in (1, 30, len(whole.splitlines()[1])):
        (tmp_path / FILE).write_text(whole[:-cut])
        assert [found["step"] for found in read(tmp_path)] == [1]
    write(tmp_path, 2, start=1)
    assert (tmp_path / FILE).read_text() == whole
    assert list(read(tmp_path / "elsewhere")) == []


def test_tensorboard_shows_the_same_numbers_once(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, tensorboard=True)
    write(tmp_path, 2, 3, 4, start=1, tensorboard=True)
    found = events(tmp_path)
    assert sorted(found) == sorted(
        ["train/loss", "train/max_vio", "balance_loss/layers.0.moe"]
        + [f"{name}/{layer}" for name in ("max_vio", "cv", "entropy", "dead", "dropped") for layer in LAYERS]
    )
    assert [(event.step, event.value) for event in found["train/loss"]] == [
        (step, pytest.approx(step / 3)) for step in (1, 2, 3, 4)
    ]
    assert [event.value for event in found["max_vio/layers.0.moe"]] == [1.25] * 4
    assert [event.value for event in found["balance_loss/layers.0.moe"]] == [1.5] * 4


def test_a_missing_tensorboard_is_named_with_the_remedy(tmp_path: Path, monkeypatch) -> None:
    installed = builtins.__import__

    def without(name, *rest):
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return installed(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'equipoise\[report\]', or train with --no-tensorboard"):
        Metrics(tmp_path, 0, tensorboard=True)
    Metrics(tmp_path, 0, tensorboard=False).close()


def events(folder: Path) -> dict:
    """What TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: board.Scalars(tag) for tag in board.Tags()["scalars"]}
