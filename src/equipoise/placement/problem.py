"""One layer's question: which devices hold which experts, so that the fullest device has as little to do as possible.

Beside the letters of ``contracts.py``: ``G`` devices, ``W`` windows of load, ``P`` slots on all devices. A placement of
a layer is ``copy_EG``: True where device g holds expert e. Two copies on one device cannot even be written down.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int, Num


@dataclass(frozen=True)
class Problem:
    """One layer, for all windows at once.

    Attributes:
        share_WE: every window's load of each expert; 1 is what a device has to do on average in that window.
        devices: G.
        slots: experts that each device holds.
        nodes: devices 0 to G / nodes - 1 are the first node, and so on.
        groups: the experts come in so many groups of neighbours, each of which stays on one node; 1 for no such rule.
    """

    share_WE: Float[np.ndarray, "W E"]
    devices: int
    slots: int
    nodes: int = 1
    groups: int = 1

    @property
    def num_experts(self) -> int:
        """E."""
        return self.share_WE.shape[1]

    @property
    def replicas(self) -> int:
        """Copies beyond the first of each expert."""
        return self.slots * self.devices - self.num_experts

    @property
    def most_copies(self) -> int:
        """Copies of one expert that there can be."""
        return min(self.devices // (self.nodes if self.groups > 1 else 1), self.replicas + 1)

    def loads(self, copy_EG: Bool[np.ndarray, "E G"]) -> Float[np.ndarray, "W G"]:
        """What every device has to do, where an expert's copies share its rows evenly."""
        return (self.share_WE / copy_EG.sum(1)) @ copy_EG

    def value(self, copy_EG: Bool[np.ndarray, "E G"]) -> float:
        """The fullest device's load in the worst window; 1 is perfect."""
        return float(self.loads(copy_EG).max())

    @cached_property
    def bound(self) -> float:
        """No placement has a lower value: the best of what averages, replication and pigeonholes say of each window."""
        return max(_bound(share_E, self) for share_E in self.share_WE)


def shares(load_WE: Num[np.ndarray, "W E"], devices: int) -> Float[np.ndarray, "V E"]:
    """Loads in units of a window's mean device load. Empty windows are left out; if all are, experts count alike."""
    load_WE = load_WE[load_WE.sum(1) > 0].astype(np.float64)
    if not len(load_WE):
        load_WE = np.ones((1, load_WE.shape[1]))
    return load_WE / load_WE.sum(1, keepdims=True) * devices


def replicate(weight_E: Float[np.ndarray, " E"], replicas: int, most: int) -> Int[np.ndarray, " E"]:
    """Copies per expert: each further one goes to the expert whose copies have most to do, up to ``most`` of it.

    No other distribution has a smaller largest load per copy (exchange argument).
    """
    count_E = np.ones(len(weight_E), np.int64)
    for _ in range(replicas):
        count_E[np.argmax(np.where(count_E < most, weight_E / count_E, -1.0))] += 1
    return count_E


def _bound(share_E: Float[np.ndarray, " E"], problem: Problem) -> float:
    G, S, most = problem.devices, problem.slots, problem.most_copies
    least_E = np.sort(share_E / most)  # the least that a device has to do for an expert it holds
    copy_E = share_E / replicate(share_E, problem.replicas, most)
    bounds = [share_E.sum() / G, copy_E.max() + least_E[: S - 1].sum()]
    # Of the k * G + 1 largest experts, two times k + 1 are never on as many devices: some device holds k + 1 of them.
    heavy_E = least_E[::-1]
    bounds += [
        heavy_E[k * G - k : k * G + 1].sum() + least_E[: S - 1 - k].sum() for k in range(1, S) if k * G < len(heavy_E)
    ]
    return float(max(bounds))
