"""The placement: which expert every slot of every device holds, as one portable JSON file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from equipoise.errors import require


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which expert every slot holds, and what is predicted of it.

    Attributes:
        physical_to_logical: the expert of every slot; slots in the order of their devices, equally many on each.
        num_experts: E.
        devices: G.
        nodes: devices 0 to G / nodes - 1 are the first node, and so on.
        solver: who found it.
        balance_L: per layer the fullest device's load, in mean device loads, in the worst window planned for.
        bound_L: per layer, what no placement can be below.
        moved: copies that a device gets which it does not hold at present.
        expert_bytes: size of one expert; None where unknown.
    """

    physical_to_logical: Int[np.ndarray, "L P"]
    num_experts: int
    devices: int
    nodes: int = 1
    solver: str = "given"
    balance_L: Float[np.ndarray, " L"] | None = None
    bound_L: Float[np.ndarray, " L"] | None = None
    moved: int = 0
    expert_bytes: int | None = None

    def __post_init__(self) -> None:
        """Fails: UserError where an expert has no slot, or slots, devices and nodes do not fit each other."""
        L, P = self.physical_to_logical.shape
        counts = min(L, P, self.num_experts, self.devices, self.nodes)
        require(counts > 0, "A placement needs a layer, a slot, an expert, a device and a node.")
        require(P % self.devices == 0, f"A placement's {P} slots do not divide over {self.devices} devices.")
        divides = self.devices % self.nodes == 0
        require(divides, f"A placement's {self.devices} devices do not divide over {self.nodes} nodes.")
        low, high = int(self.physical_to_logical.min()), int(self.physical_to_logical.max())
        known = low >= 0 and high < self.num_experts
        require(known, f"A placement's experts must be from 0 to {self.num_experts - 1}, not {low} to {high}.")
        layer, expert = np.divmod(int(self.copies_LE.argmin()), self.num_experts)
        covered = bool(self.copies_LE.min() > 0)
        require(covered, f"Layer {layer} of the placement has no slot for expert {expert}; every expert needs one.")

    @property
    def slots(self) -> int:
        """Slots of one device."""
        return self.physical_to_logical.shape[1] // self.devices

    @property
    def copies_LE(self) -> Int[np.ndarray, "L E"]:
        """How many slots hold each expert."""
        L = len(self.physical_to_logical)
        place_LP = np.arange(L)[:, None] * self.num_experts + self.physical_to_logical
        return np.bincount(place_LP.ravel(), minlength=L * self.num_experts).reshape(L, self.num_experts)

    @property
    def copy_LEG(self) -> Bool[np.ndarray, "L E G"]:
        """True where a device holds an expert."""
        L, P = self.physical_to_logical.shape
        copy_LEG = np.zeros((L, self.num_experts, self.devices), bool)
        copy_LEG[np.arange(L)[:, None], self.physical_to_logical, np.arange(P) // self.slots] = True
        return copy_LEG

    @property
    def balance(self) -> float | None:
        """The layers' mean of ``balance_L``: what the layers take, one after the other; 1 is perfect."""
        return None if self.balance_L is None else float(self.balance_L.mean())

    @property
    def bound(self) -> float | None:
        """The layers' mean of ``bound_L``; no placement has a lower balance."""
        return None if self.bound_L is None else float(self.bound_L.mean())

    @property
    def gap(self) -> float | None:
        """How far the balance is above the bound, relatively; 0 is proven optimal."""
        if self.balance is None or self.bound is None:
            return None
        return max(0.0, self.balance / self.bound - 1)

    @property
    def moved_bytes(self) -> int | None:
        """Weights that travel to get there from the present placement; None if an expert's size is unknown."""
        return None if self.expert_bytes is None else self.moved * self.expert_bytes

    def device_loads(self, load_WLE: Num[np.ndarray, "W L E"]) -> Float[np.ndarray, "W L G"]:
        """Rows of every device, where all copies of an expert share its rows evenly."""
        W, L, _ = load_WLE.shape
        each_WLE = load_WLE / self.copies_LE
        slot_WLP = np.take_along_axis(each_WLE, np.broadcast_to(self.physical_to_logical, (W, L, self._width)), 2)
        return slot_WLP.reshape(W, L, self.devices, self.slots).sum(3)

    def fullest(self, load_WLE: Num[np.ndarray, "W L E"]) -> Float[np.ndarray, "W L"]:
        """The fullest device's load, in mean device loads; 1 where there is no load."""
        load_WLG = self.device_loads(load_WLE)
        mean_WL = load_WLG.mean(2)
        return np.divide(load_WLG.max(2), mean_WL, out=np.ones_like(mean_WL), where=mean_WL > 0)

    @property
    def _width(self) -> int:
        return self.physical_to_logical.shape[1]

    def facts(self) -> dict[str, Any]:
        """What is predicted, as JSON can hold it."""
        names = ("solver", "balance", "bound", "gap", "moved", "expert_bytes", "moved_bytes")
        return {name: getattr(self, name) for name in names}


def contiguous(layers: int, num_experts: int, devices: int, slots: int, nodes: int = 1) -> Placement:
    """Expert e in slot e, and further slots from expert 0 on: where serving engines start."""
    order_P = np.arange(devices * slots) % num_experts
    return Placement(
        physical_to_logical=np.tile(order_P, (layers, 1)), num_experts=num_experts, devices=devices, nodes=nodes
    )
