"""What a comparison decides and refuses before its runs."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest

from equipoise.errors import UserError
from equipoise.training import child
from equipoise.training import compare as module
from equipoise.training.compare import BUDGET_FILE, compare
from equipoise.training.contenders import contenders
from equipoise.training.metrics import read
from equipoise.training.run import RESULT_FILE, RUNS, claim
from equipoise.training.text import read_text
from tiny_runs import STEP_FLOPS

FLOPS = 80.4 * STEP_FLOPS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("unbalanced", "swich")}, r"Unknown method 'swich' \(did you mean 'switch'\?\)"),
        ({"model": {"set": ("bias.rat=1",)}}, "Method 'loss_free' has no setting 'bias.rat' .did you mean 'bias.rate'"),
        ({"model": {"set": ("quantile.bins=9",)}}, "'quantile.bins=9' fits none of the methods unbalanced, loss_free"),
        ({"model": {"top_k": 5}}, "top_k must be at most num_experts"),
        ({"baseline": "switch"}, "baseline must be one of unbalanced, loss_free, not 'switch'"),
        ({"device": "cuda"}, "torch finds no CUDA device"),
        ({"data": {"source": "no such file"}}, "There is no file or folder 'no such file'"),
        ({"data": {"seq_len": 100_000}}, "The text has [0-9]+ tokens, but one sequence of seq_len 100000 takes 100001"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    comparison, tmp_path: Path, monkeypatch, change: dict, message: str
) -> None:
    monkeypatch.setattr(child.subprocess, "Popen", None)  # no run starts
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        compare(comparison(tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def test_a_run_gets_its_contenders_settings_and_what_scales_with_its_length(comparison, tmp_path: Path) -> None:
    config = comparison(tmp_path)
    row = contenders(config)["loss_free"]
    short, long = (module._train_config(config, row, {"flops": FLOPS}, steps, 3) for steps in (80, 40_000))
    assert (short.model.set, long.model.set) == (("bias.rate=0.019",), ("bias.rate=0.001",))
    assert (short.seed, short.flops, Path(short.out).name) == (3, FLOPS, "loss_free-seed3")
    assert [(c.log_every, c.validate_every, c.checkpoint_every) for c in (short, long)] == [
        (1, 16, 50),
        (400, 8000, 10_000),
    ]


def test_a_sweep_trains_one_run_for_each_value(comparison, tmp_path: Path) -> None:
    sweep = ("bias.rate=1e-2,1e-3",)
    config = comparison(tmp_path, sweep=sweep, baseline="loss_free bias.rate=1e-2", flops=2.0 * STEP_FLOPS)
    results = compare(config)
    names = ["unbalanced", "loss_free bias.rate=1e-2", "loss_free bias.rate=1e-3"]
    assert [run["method"] for run in results["runs"]] == names
    assert [run["settings"].get("bias.rate") for run in results["runs"]] == [None, 1e-2, 1e-3]
    assert results["baseline"] == names[1]
    folders = {path.name for path in (tmp_path / RUNS).iterdir() if path.is_dir()}
    assert folders == {"unbalanced-seed0", "loss_free-bias.rate=1e-2-seed0", "loss_free-bias.rate=1e-3-seed0"}


def test_one_comparison_at_a_time(comparison, tmp_path: Path) -> None:
    config = comparison(tmp_path)
    with claim(tmp_path, config, set()), pytest.raises(UserError, match="Another process is working in"):
        compare(config)


def test_a_run_that_fails_is_named_and_can_be_mended(comparison, tmp_path: Path, capfd) -> None:
    """Nothing came of it, so that the same folder takes the mended configuration."""
    config = comparison(tmp_path, methods=("unbalanced",))
    broken = dataclasses.replace(config.optimizer, learning_rate=1e30, min_learning_rate=0.0, warmup=0.0)
    with pytest.raises(UserError, match="The run of unbalanced, seed 0, stopped with exit code 2"):
        compare(dataclasses.replace(config, optimizer=broken))
    said = capfd.readouterr().err
    assert said.startswith("equipoise: Step 2, ")
    assert "Traceback" not in said
    assert compare(dataclasses.replace(config, flops=3.0 * STEP_FLOPS))["runs"][0]["steps"] == 3


# Minutes


def test_minutes_become_one_flop_budget_that_is_measured_once(comparison, tmp_path: Path) -> None:
    too_few = comparison(tmp_path, methods=("unbalanced",), minutes=0.001)
    with pytest.raises(
        UserError, match=r"^0\.001 minutes are too few for 1 run on this machine; give at least [0-9.]+"
    ):
        compare(too_few)
    assert not (tmp_path / BUDGET_FILE).exists()

    config = dataclasses.replace(too_few, minutes=60.0)  # not another comparison yet
    data = read_text(config.data, config.optimizer, seed=0)
    with claim(tmp_path, config, set()):
        budget = module._budget(tmp_path, config, contenders(config), data)
        measured = (tmp_path / "calibration" / RESULT_FILE).stat().st_mtime_ns
        assert module._budget(tmp_path, config, contenders(config), data) == budget
    _, *warm = (record["tokens_per_second"] for record in read(tmp_path / "calibration"))
    assert len(warm) == 4
    per_second = statistics.median(warm) * STEP_FLOPS / 64
    assert budget["minutes"] == 60.0
    assert budget["flops_per_second"] == pytest.approx(per_second)
    seconds = budget["flops"] / per_second
    assert 60 * 60 * 0.92 - 120 < seconds < 60 * 60 * 0.92  # less what comes beside a run's steps

    (tmp_path / BUDGET_FILE).write_text(json.dumps(budget | {"flops": 2.2 * STEP_FLOPS}))
    results = compare(config)
    assert results["budget"] == budget | {"flops": 2.2 * STEP_FLOPS}
    assert [run["steps"] for run in results["runs"]] == [2]
    assert (tmp_path / "calibration" / RESULT_FILE).stat().st_mtime_ns == measured
