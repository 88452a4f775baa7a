import ast
import inspect
import math
import re
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.config import CompareConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from equipoise.errors import UserError
from equipoise.toml import dump, from_dict, load, save, to_dict


def values_of(kind: Any) -> st.SearchStrategy:
    """Any value that a field of this type takes, also one that nobody would choose."""
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        return st.fixed_dictionaries({item.name: values_of(hints[item.name]) for item in fields(kind)})
    if origin is Annotated:
        pattern = getattr(args[1].allows, "__self__", None)
        return st.from_regex(pattern, fullmatch=True) if pattern else values_of(args[0]).filter(args[1].allows)
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple and args[-1] is ...:
        return st.lists(values_of(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, args))
    if args:
        return st.none() | values_of(args[0])
    numbers = st.floats(0, 1) | st.floats(allow_nan=False)
    return {int: st.integers(-1, 2**70), float: numbers, bool: st.booleans(), str: st.text()}[kind]


@pytest.mark.parametrize("cls", [TrainConfig, CompareConfig])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_round_trip_is_exact(cls, data, tmp_path_factory):
    config = from_dict(cls, data.draw(values_of(cls)))
    path = tmp_path_factory.mktemp("config") / "config.toml"
    save(config, path)
    assert load(cls, path) == config
    assert from_dict(cls, to_dict(config)) == config


def test_defaults_are_valid_and_none_is_left_out():
    TrainConfig(steps=7).check()
    CompareConfig(minutes=0.5).check()
    text = dump(TrainConfig(steps=7))
    assert "steps = 7" in text
    assert "flops" not in text
    assert "validate_every" not in text


def test_a_file_changes_only_what_it_names(tmp_path):
    path = tmp_path / "train.toml"
    path.write_text('flops = 3\n[model]\nset = ["bias.rate=1e-3"]\n[optimizer]\nbetas = [0, 0.5]\n')
    config = load(TrainConfig, path)
    expected = TrainConfig(
        flops=3.0, model=ModelConfig(set=("bias.rate=1e-3",)), optimizer=OptimizerConfig(betas=(0.0, 0.5))
    )
    assert config == expected
    assert type(config.flops) is float


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "[model]\nnum_expert = 3",
            "unknown key model.num_expert; did you mean model.num_experts or model.num_layers?",
        ),
        ("step = 3", "unknown key step; did you mean steps?"),
        ("[data]\nzzz = 1", "unknown key data.zzz; did you mean data.source or data.tokenizer or data.seq_len or "),
        ('[model]\ndim = "big"', "model.dim must be a whole number above 0, not 'big'."),
        ("[model]\ndim = 5.0", "model.dim must be a whole number above 0, not 5.0."),
        ("[model]\ndim = true", "model.dim must be a whole number above 0, not True."),
        ("[model]\ndim = 0", "model.dim must be a whole number above 0, not 0."),
        ("model = 3", "model must be a table, not 3."),
        ("steps = [3]", "steps must be a whole number above 0, not [3]."),
        ("tensorboard = 1", "tensorboard must be true or false, not 1."),
        ('dtype = "fp16"', "dtype must be one of fp32, bf16, not 'fp16'."),
        ("device = 0", "device must be one of auto, cpu, cuda, not 0."),
        ('out = ""', "out must be a text that is not empty, not ''."),
        ("flops = inf", "flops must be a number above 0, not inf."),
        ("[optimizer]\nlearning_rate = nan", "optimizer.learning_rate must be a number above 0, not nan."),
        ("[optimizer]\nwarmup = 1.5", "optimizer.warmup must be a number from 0 to 1, not 1.5."),
        ("[optimizer]\nbetas = [0.9]", "optimizer.betas must be a list of 2, not [0.9]."),
        ("[optimizer]\nbetas = [0.9, 1]", "optimizer.betas must be a number from 0 to below 1, not 1.0."),
        ('[model]\nset = "bias.rate=1"', "model.set must be a list, not 'bias.rate=1'."),
        ('[model]\nset = ["bias"]', "model.set must be a text such as bias.rate=1e-3, not 'bias'."),
        ('[data]\ntokenizer = "bpe"', "data.tokenizer must be a text such as bytes or bpe:4096, not 'bpe'."),
        ("steps = ", "Invalid value"),
    ],
)
def test_a_bad_file_is_refused_by_name(text, sentence, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{path}: {sentence}")):
        load(TrainConfig, path)


def test_an_unreadable_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'none.toml'}: No such file")):
        load(TrainConfig, tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'out = "\xe9"')
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'latin.toml'}: 'utf-8' codec can't decode")):
        load(TrainConfig, tmp_path / "latin.toml")


def run(**changes: Any) -> TrainConfig:
    return replace(TrainConfig(steps=7), **changes)


def compare(**changes: Any) -> CompareConfig:
    return replace(CompareConfig(minutes=0.5), **changes)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (run(model=ModelConfig(num_experts=5, top_k=7)), "top_k must be at most num_experts (5), not 7."),
        (run(model=ModelConfig(top_k=0)), "model.top_k must be a whole number above 0, not 0."),
        (run(model=ModelConfig(dense_layers=5)), "dense_layers must be at most 4, not 5."),
        (run(model=ModelConfig(dim=130, num_heads=3)), "dim must be a multiple of 2 * num_heads (6), not 130."),
        (run(model=ModelConfig(dim=15, num_heads=3)), "dim must be a multiple of 2 * num_heads (6), not 15."),
        (run(data=DataConfig(seq_len=-1)), "data.seq_len must be a whole number above 0, not -1."),
        (
            run(optimizer=OptimizerConfig(learning_rate=0.1, min_learning_rate=0.2)),
            "min_learning_rate must be at most learning_rate (0.1), not 0.2.",
        ),
        (
            run(optimizer=OptimizerConfig(batch_size=7, grad_accumulation=3)),
            "batch_size must be a multiple of grad_accumulation (3), not 7.",
        ),
        (run(steps=None), "Give exactly one of steps and flops, not none."),
        (run(flops=1e9), "Give exactly one of steps and flops, not both."),
        (run(seed=-1), "seed must be a whole number of at least 0, not -1."),
        (run(keep=0), "keep must be a whole number above 0, not 0."),
        (compare(minutes=None), "Give exactly one of flops, minutes and isoflop, not none."),
        (compare(flops=1e9), "Give exactly one of flops, minutes and isoflop, not flops and minutes."),
        (compare(minutes=math.inf), "minutes must be a number above 0, not inf."),
        (compare(methods=("switch", "switch")), "methods must name each method once, not switch, switch."),
        (compare(methods=()), "methods must name at least one method."),
    ],
)
def test_check_refuses_what_does_not_fit(config, sentence):
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        config.check()


def test_check_refuses_a_type_that_only_code_can_pass():
    config = TrainConfig(steps=7)
    object.__setattr__(config, "dtype", "fp8")
    with pytest.raises(UserError, match="dtype must be one of fp32, bf16, not 'fp8'"):
        config.check()


def test_flags_override_a_file(tmp_path):
    path = tmp_path / "train.toml"
    path.write_text("flops = 1e9\n[model]\ntop_k = 19\nnum_experts = 23\n")
    flags = [
        "--steps=3",
        "--flops=None",
        "--model.dim=96",
        "--model.set=bias.rate=1",
        "--optimizer.betas",
        "0.5",
        "0.75",
    ]
    config = tyro.cli(TrainConfig, default=load(TrainConfig, path), args=flags)
    config.check()
    assert config == TrainConfig(
        steps=3,
        model=ModelConfig(dim=96, top_k=19, num_experts=23, set=("bias.rate=1",)),
        optimizer=OptimizerConfig(betas=(0.5, 0.75)),
    )


def test_every_setting_has_help(capsys):
    for cls in (ModelConfig, DataConfig, OptimizerConfig, RunConfig, TrainConfig, CompareConfig):
        body = ast.parse(inspect.getsource(cls)).body[0].body
        settings = [(line, after) for line, after in pairwise([*body, None]) if isinstance(line, ast.AnnAssign)]
        silent = [line.target.id for line, after in settings if not isinstance(after, ast.Expr)]
        assert silent == (["model", "data", "optimizer"] if cls is RunConfig else [])
    with pytest.raises(SystemExit):
        tyro.cli(TrainConfig, args=["--help"])
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "Share of the steps in which the learning rate rises. (default: 0.1)" in text
