"""The machines: what a rank computes, what it holds, and the links between ranks."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from equipoise.errors import UserError, require
from equipoise.nearest import nearest


@dataclass(frozen=True, kw_only=True)
class Software:
    """How much of the hardware is reached: what ``calibrate`` fits.

    ``row_passes``, ``link_efficiency`` and ``weight_efficiency`` were fitted to LLEP's published row
    for gpt-oss-120b on eight H200, unfused research code; the others are INFERRED, for ratios cannot tell them.
    """

    efficiency: float = 0.7
    """Share of the peak that a large multiplication reaches; INFERRED."""
    half_rows: float = 128.0
    """Rows of an expert at which a multiplication reaches half of that: one tile; INFERRED."""
    launch_seconds: float = 1e-5
    """Fixed time of one expert's multiplications; INFERRED."""
    row_passes: float = 25.3
    """Times that a row of the model's width crosses the memory, at its source and where it is computed."""
    link_efficiency: float = 0.487
    """Share of a link's bandwidth that rows reach."""
    weight_efficiency: float = 0.352
    """Share of a link's bandwidth that weights reach, which travel from one rank to another."""
    hop_seconds: float = 2e-6
    """Time of a message through one switch; INFERRED."""
    message_seconds: float = 1e-6
    """Time that a rank spends on a message to one other rank; INFERRED."""
    plan_seconds: float = 1e-4
    """Time of planning and exchanging counts after the router, for planners that wait for it; INFERRED."""

    def __post_init__(self) -> None:
        """Fails: UserError for a value that makes no sense."""
        for item in fields(self):
            value = getattr(self, item.name)
            shares = item.name.endswith("efficiency")
            holds = 0 < value <= 1 if shares else 0 <= value < math.inf
            require(holds, f"{item.name} must be {'above 0, at most 1' if shares else 'at least 0'}, not {value}.")


@dataclass(frozen=True, kw_only=True)
class Link:
    """One level of the network; a message takes the lowest that joins both ranks.

    Attributes:
        name: for people.
        reach: so many consecutive ranks are joined; None: all.
        bandwidth: of a port, bytes per second and direction.
        ranks_per_port: consecutive ranks that share one port.
        hops: switches on the way.
    """

    name: str
    bandwidth: float
    reach: int | None = None
    ranks_per_port: int = 1
    hops: int = 1


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal ranks in equal nodes.

    Attributes:
        name: for people.
        num_ranks: all ranks.
        ranks_per_node: consecutive ranks of a node.
        flops: peak of a rank at the precision that is trained in, per second.
        memory: of a rank, bytes.
        memory_bandwidth: bytes per second.
        links: from the nearest to the farthest; all of a rank's traffic beyond one link passes the next.
        software: how much of that is reached.
        sources: where each figure comes from.
    """

    name: str
    num_ranks: int
    ranks_per_node: int
    flops: float
    memory: float
    memory_bandwidth: float
    links: tuple[Link, ...]
    software: Software = field(default_factory=Software)
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Fails: UserError for figures that make no sense."""
        figures = (self.flops, self.memory, self.memory_bandwidth, *(link.bandwidth for link in self.links))
        require(self.num_ranks >= 1 and self.ranks_per_node >= 1, "A cluster needs ranks and nodes of at least one.")
        positive = all(0 < figure < math.inf for figure in figures)
        require(positive, f"Every figure of cluster {self.name} must be above 0 and finite.")
        require(bool(self.links), f"Cluster {self.name} needs a link.")
        *inner, last = [link.reach for link in self.links]
        rising = [reach for reach in inner if reach is not None]
        ordered = len(rising) == len(inner) and rising == sorted(set(rising)) and last is None
        require(ordered, f"The links of {self.name} must reach farther from one to the next, the last one everywhere.")
        for link in self.links:
            shared = link.ranks_per_port >= 1 and link.hops >= 0
            require(shared, f"Link {link.name} needs at least one rank per port and no negative hops.")

    @property
    def far_bandwidth(self) -> float:
        """Bytes per second that one rank has on the slowest link it needs to reach all others."""
        needed = [link for place, link in enumerate(self.links) if not place or self._beyond(self.links[place - 1])]
        return min(link.bandwidth / link.ranks_per_port for link in needed)

    def part(self, num_ranks: int) -> Cluster:
        """The first so many ranks by themselves."""
        return replace(self, num_ranks=num_ranks)

    def _beyond(self, link: Link) -> bool:
        return link.reach is not None and link.reach < self.num_ranks


def read_cluster(text: str) -> Cluster:
    """A cluster of a known machine or of a file, such as ``h200x8:16`` (16 ranks) or ``mine.toml:64``.

    Fails: UserError for an unknown machine, a file with unknown or missing keys, and a number of ranks that is none.
    """
    name, separator, count = text.rpartition(":")
    require(bool(separator) and bool(name), f"Give a cluster as machine:ranks, such as h200x8:16, not {text!r}.")
    require(count.isdecimal() and int(count) > 0, f"The number of ranks in {text!r} must be a whole number above 0.")
    known = machines()
    if not name.endswith(".toml"):
        wrong = f"Unknown machine {name!r}{nearest(name, known)}; there are {', '.join(known)}, or give a .toml file."
        require(name in known, wrong)
    try:
        written = known[name] if name in known else Path(name).read_text(encoding="utf-8")
        return _cluster(tomllib.loads(written), int(count), name)
    except OSError as error:
        raise UserError(f"Cannot read the cluster file {name} ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{name} is no valid TOML ({error}).") from error


def machines() -> dict[str, str]:
    """The cluster files that come with Equipoise: name to content."""
    folder = resources.files("equipoise.simulator") / "clusters"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    return {file.name.removesuffix(".toml"): file.read_text(encoding="utf-8") for file in files}


def _cluster(entries: dict[str, Any], num_ranks: int, where: str) -> Cluster:
    _check_keys(entries, {"name", "ranks_per_node", "rank", "links"}, {"software"}, where)
    rank, links, software = entries["rank"], entries["links"], entries.get("software", {})
    tables = isinstance(rank, dict) and isinstance(links, list) and isinstance(software, dict)
    require(tables and all(isinstance(link, dict) for link in links), f"{where}: rank, links and software are tables.")
    figures = {"flops", "memory", "memory_bandwidth"}
    _check_keys(rank, figures, set(), f"{where}, [rank]")
    for link in links:
        _check_keys(link, {"name", "bandwidth"}, {"reach", "ranks_per_port", "hops"}, f"{where}, [[links]]")
    _check_keys(software, set(), {item.name for item in fields(Software)}, f"{where}, [software]")
    sources = {name: _source(rank[name], f"{where}, {name}") for name in sorted(figures)}
    sources |= {f"{link['name']} bandwidth": _source(link["bandwidth"], f"{where}, {link['name']}") for link in links}
    return Cluster(
        name=str(entries["name"]),
        num_ranks=num_ranks,
        ranks_per_node=_whole(entries["ranks_per_node"], f"{where}, ranks_per_node"),
        links=tuple(_link(link, where) for link in links),
        software=Software(**{name: _number(value, f"{where}, {name}") for name, value in software.items()}),
        sources=sources,
        **{name: _number(rank[name], f"{where}, {name}") for name in figures},
    )


def _link(entries: dict[str, Any], where: str) -> Link:
    counts = {
        name: _whole(entries[name], f"{where}, {name}")
        for name in ("reach", "ranks_per_port", "hops")
        if name in entries
    }
    bandwidth = _number(entries["bandwidth"], f"{where}, bandwidth")
    return Link(name=str(entries["name"]), bandwidth=bandwidth, **counts)


def _check_keys(entries: dict[str, Any], needed: set[str], others: set[str], where: str) -> None:
    for key in entries:
        require(key in needed | others, f"{where}: unknown key {key!r}{nearest(key, sorted(needed | others))}.")
    missing = sorted(needed - entries.keys())
    require(not missing, f"{where}: {', '.join(missing)} must be given.")


def _number(entry: Any, where: str) -> float:
    """A figure, by itself or as {value, source}."""
    value = entry.get("value") if isinstance(entry, dict) else entry
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where} must be a number, not {value!r}.")
    return float(value)


def _whole(value: Any, where: str) -> int:
    require(isinstance(value, int) and not isinstance(value, bool), f"{where} must be a whole number, not {value!r}.")
    return value


def _source(entry: Any, where: str) -> str:
    if not isinstance(entry, dict):
        return "no source given"
    _check_keys(entry, {"value", "source"}, set(), where)
    return str(entry["source"])
