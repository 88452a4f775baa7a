"""The configuration: frozen dataclasses, read from TOML and written beside every result.

A field's docstring is also its flag's help, and its type says which values it takes. ``check()`` asks for what concerns
several fields, once a configuration is complete: a file may leave to a flag what it needs.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from equipoise.errors import require
from equipoise.sparsity import parse
from equipoise.toml import Limit, from_dict, to_dict

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
Budgets = Annotated[str, Limit(re.compile(r"[0-9.e+]+(,[0-9.e+]+)*").fullmatch, "such as 1e11,3e11,1e12")]
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
    isoflop: Budgets | None = None
    """Budgets in FLOPs, such as 1e11,3e11,1e12: train a grid of model sizes at each, and fit a law to every method."""
    seeds: Count = 1
    """Runs per method."""
    sweep: tuple[Sweep, ...] = ()
    """Settings to try with several values, each as part.setting=value,value, such as bias.rate=1e-4,1e-3."""
    out: Name = "runs/compare"
    """Folder for the report, the results and the resolved configuration."""

    def check(self) -> None:
        """Fails: UserError at the first value that is not allowed."""
        super().check()
        _exactly_one(self, "flops", "minutes", "isoflop")
        names = ", ".join(self.methods)
        require(bool(self.methods), "methods must name at least one method.")
        require(len(set(self.methods)) == len(self.methods), f"methods must name each method once, not {names}.")


def _check_values(config: Any) -> None:
    """What a file holds was checked as it was read; code and flags may have passed anything."""
    from_dict(type(config), to_dict(config))


def _exactly_one(config: Any, *names: str) -> None:
    given = [name for name in names if getattr(config, name) is not None]
    words = f"{', '.join(names[:-1])} and {names[-1]}"
    said = "both" if len(given) == len(names) == 2 else " and ".join(given) or "none"
    require(len(given) == 1, f"Give exactly one of {words}, not {said}.")
