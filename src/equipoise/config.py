"""The configuration: frozen dataclasses, read from TOML and written beside every result.

A field's docstring is also its flag's help, and its type says which values it takes. ``check()`` asks for what concerns
several fields, once a configuration is complete: a file may leave to a flag what it needs.
"""

import difflib
import math
import re
import tomllib
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w
import tyro

from equipoise.errors import UserError, require
from equipoise.sparsity import parse

Config = TypeVar("Config")


class Limit(NamedTuple):
    """Which values of a type are allowed, and the words that follow the type's name in an error."""

    allows: Callable[[Any], object]
    words: str


Natural = Annotated[int, Limit(lambda value: value >= 0, "of at least 0")]
Count = Annotated[int, Limit(lambda value: value > 0, "above 0")]
NonNegative = Annotated[float, Limit(lambda value: 0 <= value < math.inf, "of at least 0")]
Positive = Annotated[float, Limit(lambda value: 0 < value < math.inf, "above 0")]
Share = Annotated[float, Limit(lambda value: 0 <= value <= 1, "from 0 to 1")]
Decay = Annotated[float, Limit(lambda value: 0 <= value < 1, "from 0 to below 1")]
Name = Annotated[str, Limit(bool, "that is not empty")]
Setting = Annotated[str, Limit(re.compile(r"\w+\.\w+=.+").fullmatch, "such as bias.rate=1e-3")]
KByStep = Annotated[str, Limit(re.compile("[0-9]+:[1-9][0-9]*(,[1-9][0-9]*)*").fullmatch, "such as 0:8,4,2,2 or 500:2")]
Sweep = Annotated[str, Limit(re.compile(r"\w+\.\w+=[^,\s]+(,[^,\s]+)+").fullmatch, "such as bias.rate=1e-4,1e-3,1e-2")]
Tokenizer = Annotated[str, Limit(re.compile("bytes|bpe:[1-9][0-9]*").fullmatch, "such as bytes or bpe:4096")]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The decoder and its experts."""

    dim: Count = 128
    """Model width."""
    num_layers: Count = 4
    """Layers, dense ones included."""
    num_heads: Count = 4
    """Attention heads per layer."""
    hidden_dim: Count = 128
    """Hidden width of one expert."""
    num_experts: Count = 16
    """Routed experts per layer."""
    top_k: Count = 2
    """Experts per token."""
    sparsity: tuple[KByStep, ...] = ()
    """Experts per token by step in place of top_k, one for all MoE layers or one each, such as 0:8,4,2,2 500:2."""
    shared_experts: Natural = 0
    """Experts that every token visits, beside the routed ones."""
    dense_layers: Natural = 0
    """First layers that have one dense feed-forward instead of experts."""
    method: Name = "global_batch"
    """Balancing method; `equipoise methods` lists them."""
    set: tuple[Setting, ...] = ()
    """Settings of the method's parts, each as part.setting=value, such as bias.rate=1e-3."""
    z_loss: NonNegative = 0.0
    """Weight of the router z-loss; 0 for none."""
    kernel: Literal["auto", "naive", "loop", "grouped_mm"] = "auto"
    """How the experts are computed; what auto chose is recorded."""

    def check(self) -> None:
        """Fails: UserError at the first value that is not allowed."""
        _check_values(self)
        experts, layers, pairs = self.num_experts, self.num_layers, 2 * self.num_heads
        require(self.top_k <= experts, f"top_k must be at most num_experts ({experts}), not {self.top_k}.")
        require(self.dense_layers <= layers, f"dense_layers must be at most {layers}, not {self.dense_layers}.")
        parse(self.sparsity, self.top_k, layers - self.dense_layers, experts)
        require(self.dim % pairs == 0, f"dim must be a multiple of 2 * num_heads ({pairs}), not {self.dim}.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, and how it becomes tokens."""

    source: Annotated[Name, tyro.conf.arg(name="data")] = "default"
    """Text: default, a file, a folder, or hf:NAME."""
    tokenizer: Tokenizer = "bytes"
    """bytes, or bpe:SIZE for byte-pair encoding with SIZE tokens."""
    seq_len: Count = 128
    """Tokens per sequence."""
    validation_tokens: Count = 65536
    """Tokens set aside for validation."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: Positive = 3e-3
    """Highest learning rate."""
    min_learning_rate: NonNegative = 3e-4
    """Learning rate at the end."""
    warmup: Share = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the two moments."""
    clip: Positive = 1.0
    """Largest norm of the gradient."""
    grad_accumulation: Count = 1
    """Micro-batches per step."""
    batch_size: Count = 16
    """Sequences per step, over all ranks and micro-batches."""

    def check(self) -> None:
        """Fails: UserError at the first value that is not allowed."""
        _check_values(self)
        rate, least, batch, parts = self.learning_rate, self.min_learning_rate, self.batch_size, self.grad_accumulation
        require(least <= rate, f"min_learning_rate must be at most learning_rate ({rate}), not {least}.")
        require(batch % parts == 0, f"batch_size must be a multiple of grad_accumulation ({parts}), not {batch}.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    flops: Positive | None = None
    """Floating-point operations that a run may spend."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the arithmetic."""
    threads: Count | None = None
    """CPU threads; torch decides if not given."""

    def check(self) -> None:
        """Fails: UserError at the first value that is not allowed."""
        _check_values(self)
        self.model.check()
        self.optimizer.check()


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """One training run, of so many steps or flops. Started again with the same folder, it resumes."""

    seed: Natural = 0
    """Seed of the weights and of the order of the text."""
    steps: Count | None = None
    """Optimizer steps; give this or flops."""
    out: Name = "runs/train"
    """Folder for checkpoints, metrics and the resolved configuration."""
    log_every: Count = 10
    """Steps between two log lines."""
    validate_every: Count | None = None
    """Steps between two validations; only at the end if not given."""
    checkpoint_every: Count = 100
    """Steps between two checkpoints."""
    keep: Count = 2
    """How many checkpoints to keep."""
    tensorboard: bool = True
    """Write live metrics for TensorBoard."""
    allow_inexact: bool = False
    """Resume also where the numbers may come out differently, as on another device."""
    allow_previous: bool = False
    """If the last checkpoint is damaged, resume from the newest one that is whole."""

    def check(self) -> None:
        """Fails: UserError at the first value that is not allowed."""
        super().check()
        _exactly_one(self, "steps", "flops")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(RunConfig):
    """Several methods in place of the model's own, trained alike, for so many flops each or minutes in all."""

    methods: tuple[Name, ...] = ("unbalanced", "switch", "global_batch", "loss_free", "quantile", "expert_choice")
    """Methods to compare; `equipoise methods` lists them."""
    baseline: Name | None = None
    """Method that the others are measured against; the first if not given."""
    minutes: Positive | None = None
    """Minutes that the whole comparison may take; give this or flops."""
    seeds: Count = 1
    """Runs per method."""
    sweep: tuple[Sweep, ...] = ()
    """Settings to try with several values, each as part.setting=value,value, such as bias.rate=1e-4,1e-3."""
    out: Name = "runs/compare"
    """Folder for the report, the results and the resolved configuration."""

    def check(self) -> None:
        """Fails: UserError at the first value that is not allowed."""
        super().check()
        _exactly_one(self, "flops", "minutes")
        names = ", ".join(self.methods)
        require(bool(self.methods), "methods must name at least one method.")
        require(len(set(self.methods)) == len(self.methods), f"methods must name each method once, not {names}.")


def load(cls: type[Config], path: str | Path) -> Config:
    """Read a configuration; what the file leaves out keeps its default.

    Fails: UserError, with the file's name, if it cannot be read, is not TOML, or for a key or value as in from_dict.
    """
    try:
        return from_dict(cls, tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def save(config: Any, path: str | Path) -> None:
    """Write a configuration as TOML."""
    Path(path).write_text(dump(config), encoding="utf-8")


def dump(config: Any) -> str:
    """A configuration as TOML."""
    return tomli_w.dumps(to_dict(config))


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values; what is None is left out."""
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    return {name: _plain(value) for name, value in values.items() if value is not None}


def from_dict(cls: type[Config], mapping: Mapping[str, Any]) -> Config:
    """The opposite of ``to_dict``.

    Fails: UserError for an unknown key, with those near it, and for a value of the wrong type or out of its range.
    """
    return _read(cls, mapping, ())


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def _read(kind: Any, value: Any, key: tuple[str, ...]) -> Any:
    """The value as the type ``kind`` that the field ``key`` declares."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _read(args[0], value, key)
    if is_dataclass(kind) and isinstance(value, Mapping):
        read = {name: _read(_type_of(kind, (*key, name)), item, (*key, name)) for name, item in value.items()}
        return kind(**read)  # type: ignore
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if args[-1] is ... else args
        if len(kinds) == len(value):
            return tuple(_read(inner, item, key) for inner, item in zip(kinds, value))
    base = args[0] if origin is Annotated else kind
    value = float(value) if base is float and type(value) is int else value
    known = value in args if origin is Literal else type(value) is base
    if known and (origin is not Annotated or args[1].allows(value)):
        return value
    raise UserError(f"{'.'.join(key)} must be {_expected(kind)}, not {value!r}.")


def _type_of(cls: Any, key: tuple[str, ...]) -> Any:
    """The type of the field ``key``, whose last part is a field of ``cls``."""
    hints = get_type_hints(cls, include_extras=True)
    if key[-1] in hints:
        return hints[key[-1]]
    near = difflib.get_close_matches(key[-1], hints) or list(hints)
    names = [".".join((*key[:-1], name)) for name in near]
    raise UserError(f"unknown key {'.'.join(key)}; did you mean {' or '.join(names)}?")


def _expected(kind: Any) -> str:
    """The words for a type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{_expected(args[0])} {args[1].words}"
    if origin is Literal:
        return f"one of {', '.join(args)}"
    if origin is tuple:
        return "a list" if args[-1] is ... else f"a list of {len(args)}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(kind, "a table")


def _check_values(config: Any) -> None:
    """What a file holds was checked as it was read; code and flags may have passed anything."""
    from_dict(type(config), to_dict(config))


def _exactly_one(config: Any, *names: str) -> None:
    given = [name for name in names if getattr(config, name) is not None]
    require(len(given) == 1, f"Give exactly one of {' and '.join(names)}, not {'both' if given else 'none'}.")
