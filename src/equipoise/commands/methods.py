"""``equipoise methods``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from equipoise.commands import print_json

if TYPE_CHECKING:
    from equipoise.building import Method

EXAMPLE = "equipoise methods loss_free --json"


@dataclass(frozen=True, kw_only=True)
class Config:
    """List the balancing methods, or explain one."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """A method; all of them if not given."""


def run(config: Config, as_json: bool) -> None:
    """Print all methods as a table, or all that is known of one."""
    from equipoise.methods import METHODS, find

    chosen = [find(config.name)] if config.name else list(METHODS.values())
    if as_json:
        print_json([_facts(method) for method in chosen])
    elif config.name:
        _explain(chosen[0])
    else:
        table = Table("method", "what it does", "use it when", "causal")
        table.columns[0].no_wrap = True
        for method in chosen:
            table.add_row(method.name, method.summary, method.use, _causal(method))
        Console().print(table, "equipoise methods NAME explains one.", sep="\n")


def _explain(method: Method) -> None:
    from equipoise.building import defaults

    grid = Table.grid(padding=(0, 2))
    for name, words in (
        ("source", method.source),
        ("status", method.status),
        ("parts", ", ".join(method.parts)),
        ("moves", method.moves),
        ("state", ", ".join(method.state) or "none"),
        ("traffic", method.traffic),
        ("cost", method.cost),
        ("causal", _causal(method)),
        ("use it when", method.use),
        ("not when", method.avoid),
        ("settings", ", ".join(f"{name}={value}" for name, value in defaults(method).items())),
    ):
        grid.add_row(f"[bold]{name}", words)
    Console().print(f"[bold]{method.name}[/]: {method.summary}", grid, sep="\n")


def _causal(method: Method) -> str:
    """Whether a token's experts depend on other tokens, and when."""
    return "no" if not method.causal else "in evaluation" if method.looks_ahead else "yes"


def _facts(method: Method) -> dict[str, Any]:
    from equipoise.building import defaults

    told = {"settings": defaults(method), "causal": _causal(method), "state": method.state, "status": method.status}
    return asdict(method) | told
