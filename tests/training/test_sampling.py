import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from equipoise.config import TrainConfig
from equipoise.errors import UserError
from equipoise.models.generation import generate
from equipoise.training import sampling
from equipoise.training.loop import WEIGHTS_FILE, train
from equipoise.training.run import CONFIG_FILE
from equipoise.training.sampling import continue_text, load_run
from equipoise.training.tokenizer import FILE, SEPARATOR, ByteTokenizer
from tiny_runs import parts, write_text


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(TrainConfig(**parts(write_text(folder / "text"), folder / "out", steps=20, tensorboard=False)))
    return folder / "out"


def pieces(folder: Path, prompt: str = "the ", tokens: int = 30, temperature: float = 1.0, seed: int = 0) -> list[str]:
    return list(continue_text(folder, prompt, tokens, temperature, 1.0, seed))


def test_a_run_comes_back_as_it_was_trained(run: Path) -> None:
    model, tokenizer = load_run(run)
    assert not model.training
    assert model.max_seq_len == 16
    assert isinstance(tokenizer, ByteTokenizer)
    assert float(model.layers[0].moe.balancers["bias"].bias_E.abs().max()) > 0  # the bias belongs to the weights


def test_text_continues_the_prompt_after_a_separator(run: Path) -> None:
    model, tokenizer = load_run(run)
    ids = list(generate(model, [SEPARATOR, *b"the "], 30, seed=3))
    text = "".join(pieces(run, seed=3))
    assert text == tokenizer.decode(ids).rstrip("\ufffd")
    assert pieces(run, seed=3) == pieces(run, seed=3)
    assert text != "".join(pieces(run, seed=4))
    greedy = pieces(run, temperature=0.0)
    assert greedy == pieces(run, temperature=0.0, seed=5)


def test_a_character_waits_for_all_its_bytes(run: Path, monkeypatch) -> None:
    tokens = [*"a\u00e9".encode(), *b"\xff", *"\u20acz".encode(), 0xE2, 0x82]
    monkeypatch.setattr(sampling, "generate", lambda *_: iter(tokens))
    assert pieces(run) == ["a", "", "\u00e9", "", "", "", "\ufffd\u20ac", "z", "", ""]


def test_what_is_wrong_is_said_before_the_first_piece(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no finished run \(model.safetensors is missing\); finish"):
        continue_text(tmp_path, "", 1, 1.0, 1.0, 0)
    with pytest.raises(UserError, match="temperature=-1"):
        continue_text(run, "", 1, -1.0, 1.0, 0)
    with pytest.raises(UserError, match="NUL"):
        continue_text(run, "\0", 1, 1.0, 1.0, 0)


def test_a_damaged_run_is_one_sentence(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    config = (copy / CONFIG_FILE).read_text()
    (copy / CONFIG_FILE).write_text(config.replace("hidden_dim = 16", "hidden_dim = 8"))
    with pytest.raises(UserError, match=r"does not hold this model's weights \([^\n]*\); train it"):
        load_run(copy)
    (copy / CONFIG_FILE).write_text(config)
    (copy / WEIGHTS_FILE).write_bytes((copy / WEIGHTS_FILE).read_bytes()[:-1])
    with pytest.raises(UserError, match=r"does not hold this model's weights \([^\n]*\); train it again\.$"):
        load_run(copy)
    (copy / FILE).write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json is absent, damaged or not a tokenizer of ours"):
        load_run(copy)


def test_a_run_with_experts_that_choose_is_read_left_to_right(run: Path, tmp_path: Path) -> None:
    settings = {"method": "expert_choice", "set": ("expert_choice.evaluation=top_k",)}
    config = TrainConfig(**parts(run.parent / "text", tmp_path, model=settings, steps=2, tensorboard=False))
    train(replace(config, dtype="bf16"))
    model, _ = load_run(tmp_path)
    token_BS = torch.tensor([list(b"the cat sat")])
    with torch.no_grad():
        torch.testing.assert_close(model(token_BS)[:, :5], model(token_BS[:, :5]))
    assert len(pieces(tmp_path, tokens=7)) == 7
