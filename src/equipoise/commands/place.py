"""``equipoise place``: read loads, place, say what would move and what it gains, export."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from equipoise.diagnosis.formats import read_loads
from equipoise.diagnosis.trace import Trace
from equipoise.errors import require
from equipoise.placement.export import FORMATS, read_placement, write_placement
from equipoise.placement.placement import Placement, contiguous
from equipoise.placement.settings import Settings
from equipoise.placement.solve import place
from equipoise.placement.traffic import remote_share, spread
from equipoise.placement.validate import check_counts, complaints

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

EXAMPLE = "equipoise place traces/mine --devices 64 --nodes 8 --replicas 32 --export sglang:placement.json"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Decide which devices hold which experts."""

    trace: Annotated[Path, tyro.conf.Positional]
    """A trace directory, SGLang's dump (.pt, or a directory of them), or loads as .npy or .json."""
    devices: int
    """Devices that share the experts."""
    nodes: int = 1
    """Nodes of equally many neighbouring devices."""
    replicas: int = 0
    """Copies of experts beyond the first, per layer."""
    groups: int = 1
    """Groups of neighbouring experts that each stay on one node."""
    solver: Literal["auto", "exact", "cp_sat", "pack", "eplb", "moetuner"] = "auto"
    """How to search; cp_sat needs the extra place."""
    objective: Literal["balance", "affinity", "coactivation"] = "balance"
    """balance alone; affinity: then little traffic between layers; coactivation: then a token's experts on one node."""
    seconds: float = 3.0
    """Time that an exact solver has for each layer; auto gives all layers together at most that of ten."""
    windows: int = 16
    """Windows to plan for; if the trace has more, neighbours are merged."""
    expert_size: str | None = None
    """Size of one expert's weights, such as 88MB; the trace's own if not given."""
    memory: str | None = None
    """What a device has for experts' weights, such as 60GiB."""
    current: Path | None = None
    """The present placement, in any format; experts in order if not given."""
    export: tuple[str, ...] = ()
    """Files to write, each as FORMAT:FILE, with equipoise, sglang, eplb or vllm_ascend as FORMAT."""
    dry_run: bool = False
    """Write nothing, only say what would move and what is gained."""
    seed: int = 0
    """Seed of the local search."""


def run(config: Config, as_json: bool) -> None:
    """Place, print, and write what ``export`` names.

    Fails: UserError for bad input, before anything is written.
    """
    exports = [_target(word) for word in config.export]
    trace = read_loads(config.trace)
    settings = _settings(config, trace)
    placement = place(trace, config.devices, config.nodes, config.replicas, config.groups, config.solver, settings)
    slots = check_counts(trace.num_experts, config.devices, config.nodes, config.replicas, config.groups)
    order = contiguous(len(trace.layers), trace.num_experts, config.devices, slots, config.nodes)
    facts = _facts(trace, settings.current or order, placement, settings)
    for form, file in [] if config.dry_run else exports:
        write_placement(placement, file, form)
        facts["written"].append(str(file))
    if as_json:
        print(json.dumps(facts | {"physical_to_logical": placement.physical_to_logical.tolist()}))
    else:
        _print(facts, config.dry_run)


def bytes_of(text: str) -> int:
    """A size such as ``88MB`` or ``60GiB`` in bytes.

    Fails: UserError for anything else.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    unit = match[2].upper() if match else "?"
    unit = "" if unit == "B" else unit
    require(unit in UNITS, f"A size must be such as 88MB or 60GiB, not {text!r}.")
    size = int(float(match[1]) * UNITS[unit]) if match else 0
    require(size > 0, f"A size must be above 0, not {text!r}.")
    return size


def _target(word: str) -> tuple[Any, Path]:
    form, colon, file = word.partition(":")
    known = bool(colon and file) and form in FORMATS
    require(known, f"export must be FORMAT:FILE with {', '.join(FORMATS)} as FORMAT, not {word!r}.")
    return form, Path(file)


def _settings(config: Config, trace: Trace) -> Settings:
    current = None if config.current is None else read_placement(config.current, config.devices, config.nodes)
    return Settings(
        objective=config.objective,
        seconds=config.seconds,
        windows=config.windows,
        expert_bytes=trace.expert_bytes if config.expert_size is None else bytes_of(config.expert_size),
        memory_bytes=None if config.memory is None else bytes_of(config.memory),
        current=current,
        seed=config.seed,
        show_progress=True,
    )


def _facts(trace: Trace, present: Placement, placement: Placement, settings: Settings) -> dict[str, Any]:
    """What is known of the present and the new placement, on the whole trace."""
    return {
        "layers": len(trace.layers),
        "experts": trace.num_experts,
        "windows": len(trace.load_WLE),
        "devices": placement.devices,
        "nodes": placement.nodes,
        "slots_per_device": placement.slots,
        **placement.facts(),
        "present": _measured(trace, present, settings),
        "planned": _measured(trace, placement, settings),
        "written": [],
    }


def _measured(trace: Trace, placement: Placement, settings: Settings) -> dict[str, Any]:
    fullest_WL = placement.fullest(trace.load_WLE)
    facts: dict[str, Any] = {"mean": float(fullest_WL.mean()), "worst": float(fullest_WL.mean(1).max())}
    if trace.transition_MEE is not None and trace.transition_MEE.any():
        off_device, off_node = remote_share(placement.copy_LEG, trace.transition_MEE, placement.nodes)
        facts |= {"off_device": off_device, "off_node": off_node}
    if trace.coactivation_LEE is not None and trace.coactivation_LEE.any():
        facts["apart"] = spread(placement.copy_LEG, trace.coactivation_LEE, placement.nodes)
    return facts | {"complaints": complaints(placement, settings.expert_bytes, settings.memory_bytes)}


def _print(facts: dict[str, Any], dry_run: bool) -> None:
    table = Table("", "at present", "planned")
    rows = {
        "mean": "fullest device, mean over windows and layers",
        "worst": "fullest device, worst window",
        "off_device": "rows whose next expert is on another device",
        "off_node": "rows whose next expert is on another node",
        "apart": "pairs of a token's experts on two nodes",
    }
    for name, words in rows.items():
        if name in facts["planned"]:
            table.add_row(words, *(_number(name, facts[side][name]) for side in ("present", "planned")))
    Console().print(table)
    print(
        f"{facts['experts']} experts in {facts['layers']} layers on {facts['devices']} devices in {facts['nodes']} "
        f"nodes, {facts['slots_per_device']} per device. 1 is a fullest device with no more to do than the mean.\n"
        f"Solver {facts['solver']}: planned for {facts['balance']:.4f}, proven bound {facts['bound']:.4f}, "
        f"gap {facts['gap']:.2%}."
    )
    size = "" if facts["moved_bytes"] is None else f", {facts['moved_bytes']:,} bytes"
    print(f"{'Would move' if dry_run else 'Moves'} {facts['moved']} copies{size}.")
    for side in ("present", "planned"):
        for complaint in facts[side]["complaints"]:
            print(f"{side.capitalize()} placement: {complaint}")
    for file in facts["written"]:
        print(f"Written: {file}")


def _number(name: str, value: float) -> str:
    return f"{value:.3f}" if name in ("mean", "worst") else f"{value:.1%}"
