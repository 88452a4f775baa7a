"""A comparison from end to end: killed, stopped, resumed and extended."""

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from equipoise import cli
from equipoise.config import CompareConfig, TrainConfig
from equipoise.errors import Interrupted, UserError
from equipoise.toml import load, save, to_dict
from equipoise.training import checkpoint
from equipoise.training.compare import REPORT_FILE, RESULTS_FILE, compare
from equipoise.training.loop import train
from equipoise.training.metrics import read
from equipoise.training.run import CHECKPOINTS, CONFIG_FILE, RESULT_FILE, differences
from tiny_runs import STEP_FLOPS, outcome

FLOPS = 80.4 * STEP_FLOPS
RUNS = [("unbalanced", 0), ("loss_free", 0), ("unbalanced", 1), ("loss_free", 1)]


def until(happened, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def written(folder: Path) -> dict[str, int]:
    """When each finished run wrote its result."""
    return {path.parent.name: path.stat().st_mtime_ns for path in sorted(folder.glob(f"runs/*/{RESULT_FILE}"))}


@pytest.fixture(scope="module")
def compared(comparison, tmp_path_factory) -> SimpleNamespace:
    """Two methods and two seeds, killed in the second run, stopped in the third; then a third method joins."""
    folder = tmp_path_factory.mktemp("compared")
    config = comparison(folder / "out", seeds=2)
    out, environment = folder / "out", os.environ | {"OMP_NUM_THREADS": "1"}
    save(config, folder / "config.toml")
    command = [sys.executable, "-m", "equipoise", "compare", "--config", str(folder / "config.toml")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    until(lambda: (out / "runs/loss_free-seed0/metrics.jsonl").exists())
    process.kill()
    process.wait()
    after_kill = written(out)

    third = out / "runs/unbalanced-seed1"

    def stop_it() -> None:
        until((third / CONFIG_FILE).exists)
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=stop_it, daemon=True)
    stopper.start()
    with pytest.raises(Interrupted) as stop:
        compare(config)
    stopper.join()
    saved, ended = checkpoint.latest(third / CHECKPOINTS), (third / RESULT_FILE).exists()

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = cli.main([*command[3:], "--json"])
    after_two = written(out)
    results = compare(dataclasses.replace(config, methods=("unbalanced", "expert_choice", "loss_free")))
    after_three = written(out)
    return SimpleNamespace(**locals())


def test_a_killed_comparison_goes_on_where_it_was(compared: SimpleNamespace) -> None:
    """The run that it left behind goes on alone, and is waited for, not repeated."""
    assert list(compared.after_kill) == ["unbalanced-seed0"]
    assert compared.after_two["unbalanced-seed0"] == compared.after_kill["unbalanced-seed0"]
    assert len(list(read(compared.out / "runs/loss_free-seed0"))) == 80


def test_a_stopped_comparison_lets_its_run_save(compared: SimpleNamespace) -> None:
    assert compared.stop.value.signal == signal.SIGINT
    assert str(compared.third) in str(compared.stop.value)
    assert compared.saved.name < "step-00000080"
    assert not compared.ended
    alone = load(TrainConfig, compared.out / "runs/unbalanced-seed1.toml")
    train(dataclasses.replace(alone, out=str(compared.folder / "alone")))
    assert outcome(compared.third) == outcome(compared.folder / "alone")


def test_json_on_stdout_is_results_json(compared: SimpleNamespace) -> None:
    assert compared.code == 0
    printed = json.loads(compared.printed.getvalue())
    assert [(run["method"], run["seed"]) for run in printed["runs"]] == RUNS
    assert json.loads((compared.out / RESULTS_FILE).read_text()) == compared.results
    of_two = {(run["method"], run["seed"]): run for run in compared.results["runs"]}
    assert all(of_two[run["method"], run["seed"]] == run for run in printed["runs"])


def test_results_have_every_promised_key(compared: SimpleNamespace) -> None:
    results = compared.results
    assert list(results) == ["environment", "settings", "budget", "data", "baseline", "runs", "power"]
    assert (results["environment"]["device"], results["environment"]["threads"]) == ("cpu", 1)
    assert results["settings"] == to_dict(load(CompareConfig, compared.out / CONFIG_FILE))
    assert results["budget"] == {"flops": FLOPS, "minutes": None, "flops_per_second": None}
    assert set(results["data"]) == {"source", "tokenizer", "vocab_size", "digest", "domains"}
    assert results["baseline"] == "unbalanced"
    assert results["power"].startswith("With 2 seeds, differences in perplexity under ")
    promised = (
        "method seed steps tokens flops loss perplexity max_vio_global max_vio_batch dead_experts load_cv load_entropy "
        "specialisation tokens_per_second peak_memory_bytes per_layer causal settings kernel curve validation notes"
    )
    for run in results["runs"]:
        assert set(run) == set(promised.split())
        assert len(run["per_layer"]) == 2
        assert run["perplexity"] == math.exp(run["loss"])
        assert run["tokens_per_second"] > 0
        assert run["peak_memory_bytes"] > 50e6
        assert [point["step"] for point in run["validation"]] == [16, 32, 48, 64, 80]
        assert len(run["curve"]) == 80
    assert (compared.out / REPORT_FILE).stat().st_size > 1e6


def test_all_runs_spend_the_same_flops_on_the_same_text_in_the_same_order(compared: SimpleNamespace) -> None:
    runs = compared.results["runs"]
    assert {(run["flops"], run["steps"], run["tokens"]) for run in runs} == {(80 * STEP_FLOPS, 80, 80 * 64)}
    configs = [load(TrainConfig, path) for path in sorted(compared.out.glob("runs/*.toml"))]
    assert len(configs) == 6
    for one in configs:
        differing = differences(to_dict(configs[0]), to_dict(one))
        assert differing <= {"model.method", "model.set", "seed", "out"}
    losses = {(run["method"], run["seed"]): run["curve"][0]["loss"] for run in runs}
    for seed in (0, 1):  # the same weights and the same first batch, through other experts
        assert losses["loss_free", seed] == pytest.approx(losses["unbalanced", seed], rel=0.02)
        assert losses["expert_choice", seed] == pytest.approx(losses["unbalanced", seed], rel=0.02)
    assert losses["unbalanced", 0] != losses["unbalanced", 1]


def test_what_scales_with_the_length_is_scaled_recorded_and_told(compared: SimpleNamespace) -> None:
    runs = {run["method"]: run for run in compared.results["runs"]}
    assert runs["loss_free"]["settings"]["bias.rate"] == 0.019
    assert runs["loss_free"]["notes"] == ["bias.rate is 0.019, scaled to the 80 steps of the run."]
    assert runs["unbalanced"]["notes"] == []
    for method in runs:
        *_, last = read(compared.out / f"runs/{method}-seed0")
        assert (last["step"], last["learning_rate"]) == (80, 3e-4)


def test_a_method_that_looks_ahead_is_validated_left_to_right_and_marked(compared: SimpleNamespace) -> None:
    for run in compared.results["runs"]:
        assert run["causal"] is (run["method"] != "expert_choice")
        if not run["causal"]:
            assert run["settings"]["expert_choice.evaluation"] == "top_k"
            assert run["notes"][0].startswith("Validated with every token choosing its top K, since experts cannot")


def test_a_method_that_joins_is_the_only_one_to_train(compared: SimpleNamespace) -> None:
    assert set(compared.after_three) - set(compared.after_two) == {"expert_choice-seed0", "expert_choice-seed1"}
    assert {name: compared.after_three[name] for name in compared.after_two} == compared.after_two
    again = compare(dataclasses.replace(compared.config, methods=("expert_choice", "unbalanced")))
    assert written(compared.out) == compared.after_three
    assert [run["method"] for run in again["runs"]] == ["expert_choice", "unbalanced"] * 2


def test_another_configuration_is_refused(compared: SimpleNamespace) -> None:
    before = (compared.out / CONFIG_FILE).read_bytes()
    with pytest.raises(UserError, match=r"holds results of another configuration \(flops\); choose another --out"):
        compare(dataclasses.replace(compared.config, flops=2 * FLOPS))
    assert (compared.out / CONFIG_FILE).read_bytes() == before


def test_another_text_under_the_same_name_is_refused(compared: SimpleNamespace, tmp_path: Path) -> None:
    copy = shutil.copytree(compared.out, tmp_path / "copy")
    path = copy / "runs/unbalanced-seed0" / RESULT_FILE
    result = json.loads(path.read_text())
    result["text"]["digest"] = "0" * 16
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"The text has changed since .*unbalanced-seed0 was trained; choose another"):
        compare(dataclasses.replace(compared.config, out=str(copy)))
