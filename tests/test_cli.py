"""What commands print, and how their processes end."""

import json
import os
import signal
import subprocess
import sys
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

import equipoise
from equipoise import METHODS, cli
from equipoise.commands import COMMANDS
from equipoise.config import TrainConfig
from equipoise.toml import load
from equipoise.training.run import CONFIG_FILE, RESULT_FILE
from tiny_commands import tiny_command
from tiny_runs import stopped_before, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def words(text: Path, tmp_path: Path):
    return partial(tiny_command, text, tmp_path / "out")


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert cli.main(tiny_command(text, folder)) == 0
    return folder


def test_the_overview_names_every_command(capsys) -> None:
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"  {name} " in overview and summary in overview for name, (_, summary) in COMMANDS.items())
    assert cli.main([]) == 2
    assert capsys.readouterr().out == overview
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{equipoise.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example_and_knows_its_flags(command: str, capsys) -> None:
    name, summary = COMMANDS[command]
    module = import_module(f"equipoise.commands.{name}")
    assert cli.main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert summary in shown
    assert module.EXAMPLE in shown
    assert "--json" in shown
    positional = ("--run", "--runs", "--name", "--trace", "--requests")
    assert all(flag in shown for flag in cli._flags(module.Config) if flag not in positional)


def test_train_prints_what_became_of_it(words, text: Path, tmp_path: Path, capfd) -> None:
    assert cli.main(words()) == 0
    out, _ = capfd.readouterr()
    result = json.loads((tmp_path / "out" / RESULT_FILE).read_text())
    first, second = out.splitlines()
    assert first.startswith(f"loss_free: perplexity {result['perplexity']:.3f} ({result['loss']:.4f} nats per token), ")
    assert f", {result['dead_experts']} dead experts, 5 steps, " in first
    assert second == f"Weights, metrics and checkpoints: {tmp_path / 'out'}"
    assert cli.main([*words(), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == result
    config = load(TrainConfig, tmp_path / "out" / CONFIG_FILE)
    assert (config.data.source, config.model.method, config.steps) == (str(text), "loss_free", 5)
    assert not config.tensorboard


def test_flags_override_the_file(words, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("steps = 3\nseed = 7\n[model]\nmethod = 'switch'\n")
    given = words(f"--config {tmp_path / 'mine.toml'} --no-allow-inexact")
    assert cli.main([word for word in given if word not in ("--method", "loss_free")]) == 0
    config = load(TrainConfig, tmp_path / "out" / CONFIG_FILE)
    assert (config.steps, config.seed, config.model.method) == (5, 7, "switch")


def test_other_ranks_print_nothing(words, finished: Path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("RANK", "1")
    capfd.readouterr()
    for more in ("", "--json"):
        assert cli.main(words(f"--out {finished} {more}")) == 0
    assert capfd.readouterr().out == ""


def test_methods_lists_them_all(capsys) -> None:
    assert cli.main(["methods"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in METHODS)
    assert cli.main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [method["name"] for method in listed] == list(METHODS)
    assert cli.main(["methods", "loss_free", "--json"]) == 0
    (method,) = json.loads(capsys.readouterr().out)
    assert method == next(each for each in listed if each["name"] == "loss_free")
    assert (method["balancers"], method["state"], method["causal"]) == ({"bias": {"rate": 1e-3}}, ["bias"], "yes")


def test_generate_continues_a_text(finished: Path, capfd) -> None:
    command = ["generate", str(finished), "--prompt", "the ", "--tokens", "20", "--seed", "3"]
    assert cli.main(command) == 0
    printed = capfd.readouterr().out
    assert printed.startswith("the ")
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["prompt"] == "the "
    assert f"the {found['text']}\n" == printed
    assert 5 < len(found["text"]) <= 20


def test_compare_prints_a_table_what_was_used_and_the_report(words, tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(words(command="compare")) == 0
    out = capfd.readouterr().out
    assert "loss_free" in out
    assert "loss_free: bias.rate is 0.3, scaled to the 5 steps of the run." in out
    assert "Each run: 2e+07 FLOPs, 5 steps; the learning rate rises to 0.003 in the first 10% and falls to" in out
    assert out.endswith(f"Report: {tmp_path / 'out' / 'report.html'}\n")


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_sentence_and_no_failure(words, capfd) -> None:
    """Bias steps of 1 set two biases 2 apart at once, and the layer's alarm is 1."""
    shown = warnings.showwarning
    assert cli.main(words("--set bias.rate=1.0 --json")) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["steps"] == 5
    (said,) = (line for line in err.splitlines() if "biases" in line)
    assert said.startswith("equipoise: Two selection biases of a layer lie 1 or more apart (bias.alarm): ")
    assert said.endswith("(bias.alarm=0 turns this off).")
    assert "warn" not in err.lower()  # neither "UserWarning:" nor the line of code
    assert warnings.showwarning is shown


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_its_code_and_a_sentence_and_the_same_command_resumes(
    words, tmp_path: Path, capfd, number: signal.Signals, code: int
) -> None:
    with stopped_before(4, act=lambda trainer: os.kill(os.getpid(), number)):
        assert cli.main(words("--json")) == code
    out, err = capfd.readouterr()
    assert out == ""
    sentence = f"equipoise: Stopped by {number.name}; the same command resumes from {tmp_path / 'out'}."
    assert sentence in err.splitlines()
    assert "Traceback" not in err
    assert not (tmp_path / "out" / RESULT_FILE).exists()
    assert cli.main(words("--json")) == 0
    assert json.loads(capfd.readouterr().out)["steps"] == 5


def test_ctrl_c_outside_a_training_is_130(finished: Path, monkeypatch, capfd) -> None:
    def impatient(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("equipoise.training.sampling.continue_text", impatient)
    assert cli.main(["generate", str(finished)]) == 130
    assert capfd.readouterr().err == "equipoise: Stopped by SIGINT.\n"


def test_a_process_exits_with_the_code_and_nothing_but_the_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "equipoise", "train", "--steps", "3", "--data", str(tmp_path / "nothing")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("equipoise: There is no file or folder ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["methods", "--json"], ["methods", "--json", "loss_free"], ["--help"], ["--version"]]
)
def test_a_reader_that_has_seen_enough_is_no_traceback(monkeypatch, words: list[str]) -> None:
    """Also where all that is printed fits into a buffer, and is written at the end."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # else what is left to write at the end is nothing
    command = [sys.executable, "-m", "equipoise", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == cli.FAILED
