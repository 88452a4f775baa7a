"""What happens to replicas during a replay."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from equipoise.errors import UserError, require

Kind = Literal["die", "hang", "add"]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: ``die``, connections break at once; ``hang``, it takes requests and never answers again; ``add``, a new
            one.
        replica: its number, from 0.
        time: seconds of the replay.
    """

    kind: Kind
    replica: int
    time: float

    def __post_init__(self) -> None:
        """Fails: UserError for another kind, a negative number or a time that is none."""
        require(self.kind in get_args(Kind), f"A fault is {', '.join(get_args(Kind))}, not {self.kind!r}.")
        require(self.replica >= 0, f"Replicas are numbered from 0; there is no {self.replica}.")
        require(0 <= self.time < float("inf"), f"A fault's time must be seconds from 0, not {self.time}.")


def parse_faults(text: str) -> tuple[Fault, ...]:
    """Faults from words such as ``die:3@120,add:8@300``: kind, replica, seconds. Fails: UserError for another form."""
    faults = []
    for word in filter(None, text.split(",")):
        found = re.fullmatch(r"(die|hang|add):(\d+)@(\d+(?:\.\d+)?)", word.strip())
        if not found:
            raise UserError(f"{word.strip()!r} is no fault; give kind:replica@seconds, such as die:3@120.")
        faults.append(Fault(found[1], int(found[2]), float(found[3])))  # type: ignore[arg-type]
    return tuple(faults)


def check_faults(faults: tuple[Fault, ...], replicas: int) -> None:
    """Fails: UserError for a fault of a replica that is not there at its time, or that is added twice."""
    there = set(range(replicas))
    for fault in sorted(faults, key=lambda fault: fault.time):
        known = fault.replica in there
        if fault.kind == "add":
            require(not known, f"Replica {fault.replica} cannot be added at {fault.time:g} s: it is there already.")
            there.add(fault.replica)
        else:
            require(known, f"Replica {fault.replica} cannot {fault.kind} at {fault.time:g} s: it is not there.")
            there.discard(fault.replica)
