"""Who competes in a comparison: the methods, each with the settings that concern it, once for each value of a sweep."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from typing import Any

from equipoise.building import Method
from equipoise.config import CompareConfig, RunConfig, TrainConfig
from equipoise.errors import UserError, require
from equipoise.methods import find
from equipoise.models.decoder import settings_of
from equipoise.nearest import nearest
from equipoise.training.schedule import bias_rate


@dataclass(frozen=True)
class Contender:
    """One row of a comparison.

    Attributes:
        name: the method's, with the swept settings behind it.
        method: what is trained.
        items: its settings, as ``"part.setting=value"``.
    """

    name: str
    method: Method
    items: tuple[str, ...]

    def scaled(self, steps: int) -> tuple[str, ...]:
        """The settings, with the step of a bias fitted to the length of the run unless the user chose it."""
        if self.scales_bias:
            return (*self.items, f"bias.rate={bias_rate(steps):.2g}")
        return self.items

    def run(self, config: CompareConfig, items: tuple[str, ...], seed: int, out: str) -> TrainConfig:
        """What all runs of a comparison share, with this method and these settings."""
        shared: dict[str, Any] = {item.name: getattr(config, item.name) for item in fields(RunConfig)}
        model = replace(config.model, method=self.method.name, set=items)
        return TrainConfig(**(shared | {"model": model, "seed": seed, "out": out, "tensorboard": False}))

    @property
    def scales_bias(self) -> bool:
        """Whether the step of a bias is ours to choose."""
        given = settings_of(self.items)
        rule = given.get("bias.rule") or self.method.balancers.get("bias", {}).get("rule", "sign")
        return "bias" in self.method.parts and rule == "sign" and "bias.rate" not in given


def contenders(config: CompareConfig) -> dict[str, Contender]:
    """The rows of a comparison by name, in the order of the methods.

    Fails: UserError for an unknown method, a setting that fits none, or a baseline that does not take part.
    """
    methods = [find(name) for name in config.methods]
    _refuse_unused(config, methods)
    found = [contender for method in methods for contender in _of(config, method)]
    by_name = {contender.name: contender for contender in found}
    names = ", ".join(by_name)
    require(
        config.baseline is None or config.baseline in by_name,
        f"baseline must be one of {names}, not {config.baseline!r}{nearest(config.baseline or '', by_name)}.",
    )
    return by_name


def _of(config: CompareConfig, method: Method) -> list[Contender]:
    """One contender, or one for each combination of the swept values that concern the method."""
    parts = method.parts
    given = tuple(item for item in config.model.set if item.partition(".")[0] in parts)
    swept = [_values(sweep) for sweep in config.sweep if sweep.partition(".")[0] in parts]
    rows = []
    for combination in itertools.product(*swept):
        items = (*given, *combination)
        evaluation = f"{method.selector}.evaluation="
        if not method.causal and not any(item.startswith(evaluation) for item in items):
            items += (f"{evaluation}top_k",)
        rows.append(Contender(" ".join((method.name, *combination)), method, items))
    return rows


def _values(sweep: str) -> list[str]:
    """``"bias.rate=1e-4,1e-3"`` as its settings."""
    name, _, listed = sweep.partition("=")
    return [f"{name}={value}" for value in listed.split(",")]


def _refuse_unused(config: CompareConfig, methods: list[Method]) -> None:
    """Fails: UserError for a setting that concerns no method, or is both set and swept."""
    known = {part for method in methods for part in method.parts}
    for item in (*config.model.set, *config.sweep):
        if item.partition(".")[0] not in known:
            raise UserError(f"Setting {item!r} fits none of the methods {', '.join(config.methods)}.")
    names = [item.partition("=")[0] for item in (*config.model.set, *config.sweep)]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"Setting {twice} is given twice; give it once, or several values to --sweep.")
