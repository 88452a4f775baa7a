import errno
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from equipoise.config import CompareConfig, ModelConfig, TrainConfig
from equipoise.errors import Interrupted, UserError
from equipoise.toml import dump, load
from equipoise.training import run
from equipoise.training.run import (
    CONFIG_FILE,
    FREE,
    World,
    agreed_stop,
    choose_device,
    claim,
    differences,
    fingerprint,
    precision,
    refuse_inexact,
    signals,
    wait_for,
    world,
    write,
    write_json,
)

CONFIG = TrainConfig(steps=7)
OTHER = TrainConfig(steps=7, model=ModelConfig(top_k=3), seed=1)
ALONE = World(0, 1, torch.device("cpu"))


def test_a_folder_gets_the_configuration_and_is_taken_up_again_with_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with claim(folder, CONFIG, FREE) as resumes:
        assert not resumes
        assert load(TrainConfig, folder / CONFIG_FILE) == CONFIG
    with claim(folder, CONFIG, FREE) as resumes:
        assert resumes
    freely = TrainConfig(
        steps=7, threads=3, log_every=1, keep=5, tensorboard=False, allow_inexact=True, out="elsewhere"
    )
    with claim(folder, freely, FREE) as resumes:
        assert resumes
    assert load(TrainConfig, folder / CONFIG_FILE) == freely
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("held", ["result.json", "checkpoints/step-00000003/checkpoint.json", "runs/a/result.json"])
def test_results_of_another_configuration_are_refused_and_kept(tmp_path: Path, held: str) -> None:
    with claim(tmp_path, CONFIG, FREE):
        (tmp_path / held).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / held).write_text("held")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"holds results of another configuration \(model.top_k, seed\); choose"):
        claim(tmp_path, OTHER, FREE).__enter__()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_start_that_came_to_nothing_keeps_nobody_out(tmp_path: Path) -> None:
    with claim(tmp_path, CONFIG, FREE):
        (tmp_path / "metrics.jsonl").write_text("{}\n")
    with claim(tmp_path, OTHER, FREE) as resumes:
        assert not resumes
    assert load(TrainConfig, tmp_path / CONFIG_FILE) == OTHER


def test_a_damaged_configuration_is_named_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(dump(CONFIG)[:-5] + "\0")
    with pytest.raises(UserError, match=CONFIG_FILE):
        claim(tmp_path, CONFIG, FREE).__enter__()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with claim(tmp_path, CONFIG, FREE):
        with pytest.raises(UserError, match=f"Another process is working in {tmp_path}; wait for it"):
            claim(tmp_path, CONFIG, FREE).__enter__()
        waiter = threading.Thread(target=wait_for, args=(tmp_path,), daemon=True)
        waiter.start()
        waiter.join(0.2)
        assert waiter.is_alive()
    waiter.join(10)
    assert not waiter.is_alive()
    with claim(tmp_path, CONFIG, FREE):
        pass


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match=r"^Cannot write .*file.* \(.*\); make room or choose another --out: "):
            claim(tmp_path / place, CONFIG, FREE).__enter__()
    with pytest.raises(UserError, match=r"No space left on device"), claim(tmp_path / "run", CONFIG, FREE):
        Path("/dev/full").write_text("more than fits")
    with pytest.raises(ConnectionResetError), claim(tmp_path / "run", CONFIG, FREE):
        raise ConnectionResetError(errno.ECONNRESET, "of a text that comes over the network")


def test_a_write_replaces_the_whole_file_or_nothing(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "result.json"
    write(path, "old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", _die)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"loss": 1.5})
    assert path.read_text() == "old"
    write_json(path, {"loss": 1.5})
    assert path.read_text() == '{\n "loss": 1.5\n}'


def test_differences_are_dotted_keys() -> None:
    one = {"a": 1, "b": {"c": 2, "d": {"e": [3]}}, "only": 0}
    other = {"a": 1, "b": {"c": 5, "d": {"e": [4]}}, "b2": {}}
    assert differences(one, other) == {"b.c", "b.d.e", "only", "b2"}
    assert differences(one, one) == set()


@pytest.mark.parametrize(
    ("changed", "ranks", "text"),
    [
        ("dtype", ALONE, "abc"),
        ("ranks", World(0, 2, torch.device("cpu")), "abc"),
        ("text", ALONE, "abd"),
    ],
)
def test_a_resume_that_would_not_be_exact_is_refused_unless_allowed(changed: str, ranks: World, text: str) -> None:
    saved = fingerprint(CONFIG, ALONE, "abc")
    refuse_inexact(saved, fingerprint(CONFIG, ALONE, "abc"), allowed=False)
    here = fingerprint(TrainConfig(steps=7, dtype="bf16") if changed == "dtype" else CONFIG, ranks, text)
    message = f"cannot continue bit for bit: {changed} was {saved[changed]!r} and is {here[changed]!r}. Resume it"
    with pytest.raises(UserError, match=message):
        refuse_inexact(saved, here, allowed=False)
    refuse_inexact(saved, here, allowed=True)


def test_another_version_processor_or_thread_count_is_not_exact(monkeypatch) -> None:
    saved = fingerprint(CONFIG, ALONE, "")
    assert saved["threads"] == 1
    assert saved["torch"] == torch.__version__
    monkeypatch.setattr(torch, "__version__", "1.0")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(run.platform, "machine", lambda: "abacus")
    here = fingerprint(CONFIG, ALONE, "")
    assert {key for key in here if here[key] != saved[key]} == {"torch", "cpu", "threads"}
    with pytest.raises(UserError, match=r"torch was .* and is '1.0'; cpu was .*; threads was 1 and is 5"):
        refuse_inexact(saved, here, allowed=False)


def test_signals_are_noted_and_a_second_sigint_acts() -> None:
    def usual(number: int, frame: object) -> None:
        raise InterruptedError(number)

    before = [signal.signal(number, usual) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with signals() as received:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            assert received == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]
            with pytest.raises(InterruptedError):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is usual
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)
    assert agreed_stop([], ALONE) is None
    assert agreed_stop(received, ALONE) == signal.SIGTERM
    stop = Interrupted(signal.SIGTERM, Path("runs/mine"))
    assert (stop.signal, str(stop)) == (15, "Stopped by SIGTERM; the same command resumes from runs/mine.")


def test_the_device_and_the_threads_are_those_of_the_configuration(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch finds no CUDA device; use device='cpu' or 'auto'"):
        choose_device(TrainConfig(device="cuda"))
    for device in ("auto", "cpu"):
        assert choose_device(CompareConfig(device=device)) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (
        choose_device(TrainConfig(device="auto")) == choose_device(TrainConfig(device="cuda")) == torch.device("cuda:3")
    )
    assert choose_device(TrainConfig(device="cpu")) == torch.device("cpu")
    try:
        with world(TrainConfig(device="cpu", threads=3)) as ranks:
            assert torch.get_num_threads() == 3
            assert (ranks, ranks.leads) == (ALONE, True)
    finally:
        torch.set_num_threads(1)


def test_bf16_is_autocast() -> None:
    weight = torch.ones(3, 3)
    for dtype, product in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with precision(TrainConfig(dtype=dtype), torch.device("cpu")):
            assert (weight @ weight).dtype == product


def _die(*_: object) -> None:
    raise KeyboardInterrupt
