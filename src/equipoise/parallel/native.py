"""Plain expert parallelism: owners compute."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from equipoise.parallel.plan import Plan, Segment, checked


@dataclass(frozen=True)
class Native:
    """Every expert is computed by its owner; no weight travels. What the other planners are measured against."""

    window: int = field(default=0, init=False, repr=False)

    def plan(
        self,
        load_RE: Int[np.ndarray, "R E"],
        owner_E: Int[np.ndarray, " E"],
        history_WE: Int[np.ndarray, "W E"] | None = None,
    ) -> Plan:
        """Plan one step; ``history_WE`` is not read. Fails: UserError for loads and owners that do not fit."""
        load_RE, owner_E = checked(load_RE, owner_E)
        return native_plan(load_RE.sum(0), owner_E, load_RE.shape[0])


def native_plan(load_E: Int[np.ndarray, " E"], owner_E: Int[np.ndarray, " E"], num_ranks: int) -> Plan:
    """All rows of an expert on its owner."""
    owners = owner_E.tolist()
    return Plan(
        num_ranks=num_ranks,
        segments=[[Segment(owner, 0, rows)] if rows else [] for owner, rows in zip(owners, load_E.tolist())],
        resident=[[owner] for owner in owners],
        transfers=[],
        dropped=[0] * len(owners),
    )
