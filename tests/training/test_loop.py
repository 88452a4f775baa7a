import dataclasses
import json
import math
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch

from equipoise.config import TrainConfig, save
from equipoise.contracts import UserError
from equipoise.models.decoder import Decoder, loss
from equipoise.training import checkpoint, loop
from equipoise.training.loop import WEIGHTS_FILE, Run, train
from equipoise.training.metrics import read
from equipoise.training.run import CHECKPOINTS, CONFIG_FILE, RESULT_FILE, Interrupted
from equipoise.training.sampling import load_run
from equipoise.training.text import read_text
from equipoise.training.trainer import Trainer
from tiny_runs import outcome, parts, write_text

HERE = Path(__file__).parent
STEPS, EVERY = 9, 3


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def make(text: Path):
    """Makes the configuration of a tiny run of 9 steps, saved after the third and the sixth."""

    def make(out: Path, **settings) -> TrainConfig:
        own = {"checkpoint_every": EVERY, "log_every": 1, "validate_every": 2, "tensorboard": False}
        budget = {} if "flops" in settings else {"steps": STEPS}
        return TrainConfig(**parts(text, out, **budget | own | settings))

    return make


@pytest.fixture(scope="module")
def alone(make, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("alone")
    train(make(folder))
    return folder


@pytest.fixture
def interrupted(make, tmp_path: Path):
    """Makes a run that was killed in its eighth step: its folder and configuration."""

    def interrupted(**settings) -> TrainConfig:
        config = make(tmp_path / "run", **settings)
        with pytest.raises(Killed), stopped_before(8):
            train(config)
        return config

    return interrupted


class Killed(Exception):
    """Stands for a kill that leaves no time to save."""


@contextmanager
def stopped_before(step: int, act=None):
    """Let the trainer's step of this number raise, or act."""
    plain = Trainer.step

    def mortal(self: Trainer) -> dict[str, float]:
        if self.done + 1 == step:
            if act is None:
                raise Killed
            act(self)
        return plain(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", mortal)
        yield


def saved(config: TrainConfig) -> list[str]:
    return sorted(path.name for path in Path(config.out, CHECKPOINTS).iterdir())


# A run that nothing interrupts


def test_the_folder_holds_what_the_run_was_and_became(make, alone: Path) -> None:
    result = json.loads((alone / RESULT_FILE).read_text())
    assert result == train(make(alone))  # a finished run is not repeated
    assert {path.name for path in alone.iterdir()} == {
        ".lock", CONFIG_FILE, "tokenizer.json", "metrics.jsonl", CHECKPOINTS, WEIGHTS_FILE, RESULT_FILE
    }  # fmt: skip
    assert [result[key] for key in ("method", "seed", "steps", "tokens", "causal")] == ["loss_free", 0, 9, 576, True]
    assert result["perplexity"] == math.exp(result["loss"])
    assert result["settings"]["bias.rate"] == 1e-3
    assert result["kernel"] == "grouped_mm"
    assert result["tokens_per_second"] > 0
    assert result["peak_memory_bytes"] > 50e6  # torch alone takes that
    assert {**result["text"], "digest": None} == {
        "tokenizer": "bytes",
        "vocab_size": 256,
        "digest": None,
        "domains": result["text"]["domains"],
    }
    assert set(result["text"]["domains"]) == {"verse", "sums"}
    assert sum(sum(domain.values()) for domain in result["text"]["domains"].values()) == 10 * 812


def test_the_result_is_what_the_exported_weights_give(make, alone: Path) -> None:
    result = json.loads((alone / RESULT_FILE).read_text())
    config = make(alone)
    model, _ = load_run(alone)
    data = read_text(config.data, config.optimizer, seed=0)
    total = count = 0.0
    load = torch.zeros(4, dtype=torch.int64)
    for token_BS, _ in data.validation:
        with torch.no_grad():
            total += loss(model(token_BS[:, :-1]), token_BS[:, 1:]).item() * token_BS[:, 1:].numel()
        count += token_BS[:, 1:].numel()
        load += model.layers[1].moe.routing.load_E
    assert result["loss"] == pytest.approx(total / count, rel=1e-6)
    layers = result["per_layer"]
    assert [layer["name"] for layer in layers] == ["layers.0.moe", "layers.1.moe"]
    assert layers[1]["load"] == load.tolist()
    assert sum(layers[1]["load"]) == 2 * count
    for mean, key in (("max_vio_global", "max_vio"), ("load_cv",) * 2, ("load_entropy",) * 2, ("specialisation",) * 2):
        assert result[mean] == (layers[0][key] + layers[1][key]) / 2
    assert result["dead_experts"] == layers[0]["dead_experts"] + layers[1]["dead_experts"]


def test_metrics_follow_the_run(make, alone: Path, tmp_path: Path) -> None:
    records = list(read(alone))
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["tokens"] for record in records] == [64 * step for step in range(1, STEPS + 1)]
    result = json.loads((alone / RESULT_FILE).read_text())
    assert records[-1]["flops"] == result["flops"] == 9 * records[0]["flops"]
    assert result["max_vio_batch"] == records[-1]["max_vio"]  # the last tenth of the records, at least one
    keys = ("step", "tokens", "flops", "loss", "max_vio")
    assert result["curve"] == [{key: record[key] for key in keys} for record in records]
    assert [point["step"] for point in result["validation"]] == [2, 4, 6, 8, 9]
    assert result["validation"][-1] == {"step": 9, "flops": result["flops"], "loss": result["loss"]}
    for record in records:
        loads = [layer["load"] for layer in record["layers"].values()]
        assert [sum(load) for load in loads] == [128, 128]
        assert record["max_vio"] == sum(max(load) / 32 - 1 for load in loads) / 2
    train(make(tmp_path, log_every=4))
    sparse = list(read(tmp_path))
    assert [record["step"] for record in sparse] == [4, 8, 9]
    for key in ("loss", "max_vio"):
        means = [sum(record[key] for record in part) / len(part) for part in (records[:4], records[4:8], records[8:])]
        assert [record[key] for record in sparse] == pytest.approx(means)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == (alone / WEIGHTS_FILE).read_bytes()


def test_the_bar_shows_steps_speed_and_time_left(make, tmp_path: Path, capfd) -> None:
    train(make(tmp_path))
    shown = capfd.readouterr().err
    assert shown.startswith("loss_free, seed 0 ")
    assert " 9/9 loss " in shown
    assert "tokens/s 0:00:00" in " ".join(shown.split())


def test_a_flop_budget_sets_the_length_of_the_schedule_too(make, alone: Path, tmp_path: Path) -> None:
    flops = 9.3 * next(read(alone))["flops"]
    result = train(make(tmp_path, flops=flops))
    assert result["steps"] == 9
    assert abs(result["flops"] - flops) < 0.5 * flops / 9.3
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == (alone / WEIGHTS_FILE).read_bytes()


# Resuming


@pytest.fixture(scope="module")
def killed(make, tmp_path_factory) -> SimpleNamespace:
    return killed_runs(make, tmp_path_factory.mktemp("killed"), every=17)


def killed_runs(make, folder: Path, every: int) -> SimpleNamespace:
    """Runs that were killed and stopped in many places, by ``killed_runs.py``."""
    config = make(folder, keep=1, tensorboard=True, optimizer={"grad_accumulation": 2})
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
def test_killed_at_every_single_change_of_its_folder_a_run_continues_bit_for_bit(make, tmp_path: Path) -> None:
    """The test before kills at one change in seventeen."""
    assert same_as_the_uninterrupted(killed_runs(make, tmp_path, every=1)) > 150


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


def test_half_precision_and_half_a_log_interval_resume_bit_for_bit(interrupted, make, tmp_path: Path) -> None:
    config = interrupted(dtype="bf16", log_every=4)
    assert saved(config) == ["step-00000003", "step-00000006"]
    train(config)
    train(make(tmp_path / "alone", dtype="bf16", log_every=4))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "alone")


@pytest.mark.parametrize("method", ["quantile", "global_batch"])
def test_other_state_resumes_bit_for_bit(interrupted, make, tmp_path: Path, method: str) -> None:
    train(interrupted(model={"method": method}))
    train(make(tmp_path / "alone", model={"method": method}))
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


def test_another_text_under_the_same_name_is_refused(make, tmp_path: Path) -> None:
    data = write_text(tmp_path / "text")
    config = make(tmp_path / "run")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(data)))
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


def test_a_stream_resumes_bit_for_bit(make, tmp_path: Path, monkeypatch) -> None:
    """Its position is not a function of the step, and comes from the checkpoint."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows").mkdir()
    rows = ({"text": f"row {number} {'very ' * (number % 7)}long", "domain": "ab"[number % 2]} for number in range(301))
    (tmp_path / "rows" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = make(tmp_path / "alone")
    alone = dataclasses.replace(alone, data=dataclasses.replace(alone.data, source=f"hf:{tmp_path / 'rows'}"))
    killed = dataclasses.replace(alone, out=str(tmp_path / "killed"))
    with pytest.raises(Killed), stopped_before(8):
        train(killed)
    train(killed)
    train(alone)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "alone")
    assert set(json.loads((tmp_path / "alone" / RESULT_FILE).read_text())["per_layer"][0]["domain_load"]) == {"a", "b"}


# What goes wrong


def test_nan_keeps_the_last_good_checkpoint_and_the_metrics(make, tmp_path: Path) -> None:
    def poison(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.model.layers[1].moe.router.weight.fill_(math.nan)

    config = make(tmp_path)
    with stopped_before(8, poison), pytest.raises(UserError, match=r"^Step 8, layer layers.1.moe: "):
        train(config)
    assert saved(config) == ["step-00000003", "step-00000006"]
    assert [record["step"] for record in read(tmp_path)] == list(range(1, 8))
    assert not (tmp_path / RESULT_FILE).exists()
    train(config)  # what was saved is good: without the poison the run ends
    assert (tmp_path / RESULT_FILE).exists()


def test_a_learning_rate_out_of_this_world_names_step_and_layer(make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^Step 2, (layer|gradient of) layers\.\d\..*: .*learning rate"):
        train(make(tmp_path, optimizer={"learning_rate": 1e30, "min_learning_rate": 0.0, "warmup": 0.0}))


@contextmanager
def no_file_above(size: int):
    """The disk is full: no file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (200, r"^Cannot write to .*run \(File too large\); make room or choose another --out: what was saved before"),
        (1500, r"^Cannot write to .*run \(File too large\)"),  # the configuration fits, the metrics do not
        (20_000, r"^Cannot write the checkpoint of step 6 .*: File too large; make room .* \(the last good checkpoint"),
    ],
)
def test_a_full_disk_loses_nothing(make, alone: Path, tmp_path: Path, size: int, message: str) -> None:
    config = make(tmp_path / "run")
    with pytest.raises(Killed), stopped_before(5):
        train(config)
    with no_file_above(size), pytest.raises(UserError, match=message):
        train(config)
    assert saved(config) == ["step-00000003"]
    train(config)
    assert outcome(tmp_path / "run") == outcome(alone)


def test_a_full_disk_at_the_end_keeps_the_checkpoint(make, alone: Path, tmp_path: Path, monkeypatch) -> None:
    config = make(tmp_path / "run")

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_json", full)
        with pytest.raises(UserError, match=r"^Cannot write to .*run \(No space left on device\); make room"):
            train(config)
    train(config)
    assert outcome(tmp_path / "run") == outcome(alone)


def test_a_method_that_refuses_evaluation_is_told_so_before_it_trains_and_can_be_mended(make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="evaluation='top_k'"):
        train(make(tmp_path, model={"method": "expert_choice"}))
    assert not list(read(tmp_path))
    mended = {"method": "expert_choice", "set": ("expert_choice.evaluation=top_k",)}
    result = train(make(tmp_path, model=mended))
    assert (result["causal"], result["steps"]) == (False, STEPS)


def test_a_signal_during_preparation_is_obeyed_after_the_first_step(make, tmp_path: Path) -> None:
    config = make(tmp_path)

    def ask(self: Run, trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        plain(self, trainer)

    plain = Run.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "__init__", ask)
        with pytest.raises(Interrupted, match="Stopped by SIGTERM"):
            train(config)
    assert checkpoint.latest(tmp_path / CHECKPOINTS).name == "step-00000001"


# Many ranks


@pytest.fixture(scope="module")
def ranks(make, tmp_path_factory) -> SimpleNamespace:
    """Two processes under torchrun: a run, one that is stopped and resumed there, and what each rank saw."""
    folder = tmp_path_factory.mktemp("ranks")
    config = make(folder, model={"method": "global_batch"}, optimizer={"grad_accumulation": 2})
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


def test_without_experts_there_is_nothing_to_balance(make, tmp_path: Path) -> None:
    result = train(make(tmp_path, model={"dense_layers": 2}))
    assert (result["settings"], result["per_layer"], result["max_vio_global"]) == ({}, [], 0.0)
    assert all(record["layers"] == {} for record in read(tmp_path))
    assert isinstance(load_run(tmp_path)[0], Decoder)
