"""A run that nothing interrupts, and what goes wrong in one."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from equipoise.errors import Interrupted, UserError
from equipoise.models.decoder import Decoder, loss
from equipoise.training import checkpoint, loop
from equipoise.training.loop import WEIGHTS_FILE, Run, train
from equipoise.training.metrics import read
from equipoise.training.run import CHECKPOINTS, CONFIG_FILE, RESULT_FILE
from equipoise.training.sampling import load_run
from equipoise.training.text import read_text
from equipoise.training.trainer import Trainer
from tiny_runs import STEPS, Killed, no_file_above, outcome, saved, stopped_before


def test_the_folder_holds_what_the_run_was_and_became(tiny, alone: Path) -> None:
    result = json.loads((alone / RESULT_FILE).read_text())
    assert result == train(tiny(alone))  # a finished run is not repeated
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


def test_the_result_is_what_the_exported_weights_give(tiny, alone: Path) -> None:
    result = json.loads((alone / RESULT_FILE).read_text())
    config = tiny(alone)
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


def test_metrics_follow_the_run(tiny, alone: Path, tmp_path: Path) -> None:
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
    train(tiny(tmp_path, log_every=4))
    sparse = list(read(tmp_path))
    assert [record["step"] for record in sparse] == [4, 8, 9]
    for key in ("loss", "max_vio"):
        means = [sum(record[key] for record in part) / len(part) for part in (records[:4], records[4:8], records[8:])]
        assert [record[key] for record in sparse] == pytest.approx(means)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == (alone / WEIGHTS_FILE).read_bytes()


def test_the_bar_shows_steps_speed_and_time_left(tiny, tmp_path: Path, capfd) -> None:
    train(tiny(tmp_path))
    shown = capfd.readouterr().err
    assert shown.startswith("loss_free, seed 0 ")
    assert " 9/9 loss " in shown
    assert "tokens/s 0:00:00" in " ".join(shown.split())


def test_a_flop_budget_sets_the_length_of_the_schedule_too(tiny, alone: Path, tmp_path: Path) -> None:
    flops = 9.3 * next(read(alone))["flops"]
    result = train(tiny(tmp_path, flops=flops))
    assert result["steps"] == 9
    assert abs(result["flops"] - flops) < 0.5 * flops / 9.3
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == (alone / WEIGHTS_FILE).read_bytes()


def test_without_experts_there_is_nothing_to_balance(tiny, tmp_path: Path) -> None:
    result = train(tiny(tmp_path, model={"dense_layers": 2}))
    assert (result["settings"], result["per_layer"], result["max_vio_global"]) == ({}, [], 0.0)
    assert all(record["layers"] == {} for record in read(tmp_path))
    assert isinstance(load_run(tmp_path)[0], Decoder)


# What goes wrong


def test_nan_keeps_the_last_good_checkpoint_and_the_metrics(tiny, tmp_path: Path) -> None:
    def poison(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.model.layers[1].moe.router.weight.fill_(math.nan)

    config = tiny(tmp_path)
    with stopped_before(8, poison), pytest.raises(UserError, match=r"^Step 8, layer layers.1.moe: "):
        train(config)
    assert saved(config) == ["step-00000003", "step-00000006"]
    assert [record["step"] for record in read(tmp_path)] == list(range(1, 8))
    assert not (tmp_path / RESULT_FILE).exists()
    train(config)  # what was saved is good: without the poison the run ends
    assert (tmp_path / RESULT_FILE).exists()


def test_a_learning_rate_out_of_this_world_names_step_and_layer(tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^Step 2, (layer|gradient of) layers\.\d\..*: .*learning rate"):
        train(tiny(tmp_path, optimizer={"learning_rate": 1e30, "min_learning_rate": 0.0, "warmup": 0.0}))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (200, r"^Cannot write to .*run \(File too large\); make room or choose another --out: what was saved before"),
        (1500, r"^Cannot write to .*run \(File too large\)"),  # the configuration fits, the metrics do not
        (20_000, r"^Cannot write the checkpoint of step 6 .*: File too large; make room .* \(the last good checkpoint"),
    ],
)
def test_a_full_disk_loses_nothing(tiny, alone: Path, tmp_path: Path, size: int, message: str) -> None:
    config = tiny(tmp_path / "run")
    with pytest.raises(Killed), stopped_before(5):
        train(config)
    with no_file_above(size), pytest.raises(UserError, match=message):
        train(config)
    assert saved(config) == ["step-00000003"]
    train(config)
    assert outcome(tmp_path / "run") == outcome(alone)


def test_a_full_disk_at_the_end_keeps_the_checkpoint(tiny, alone: Path, tmp_path: Path, monkeypatch) -> None:
    config = tiny(tmp_path / "run")

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_json", full)
        with pytest.raises(UserError, match=r"^Cannot write to .*run \(No space left on device\); make room"):
            train(config)
    train(config)
    assert outcome(tmp_path / "run") == outcome(alone)


def test_a_method_that_refuses_evaluation_is_told_so_before_it_trains_and_can_be_mended(tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="evaluation='top_k'"):
        train(tiny(tmp_path, model={"method": "expert_choice"}))
    assert not list(read(tmp_path))
    mended = {"method": "expert_choice", "set": ("expert_choice.evaluation=top_k",)}
    result = train(tiny(tmp_path, model=mended))
    assert (result["causal"], result["steps"]) == (False, STEPS)


def test_a_signal_during_preparation_is_obeyed_after_the_first_step(tiny, tmp_path: Path) -> None:
    config = tiny(tmp_path)

    def ask(self: Run, trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        plain(self, trainer)

    plain = Run.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "__init__", ask)
        with pytest.raises(Interrupted, match="Stopped by SIGTERM"):
            train(config)
    assert checkpoint.latest(tmp_path / CHECKPOINTS).name == "step-00000001"
