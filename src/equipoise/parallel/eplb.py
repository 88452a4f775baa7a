"""DeepSeek's expert-parallel load balancer (EPLB): how many replicas an expert gets, and which device holds them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from equipoise.errors import require


class ReplicaMaps(NamedTuple):
    """Where the replicas of ``L`` layers lie.

    Attributes:
        physical_to_logical: the expert in each slot, [L, slots]; slots in device order.
        logical_to_physical: the slots of each expert, [L, E, most replicas]; -1 where there is no further replica.
        replicas: how many each expert has, [L, E].
    """

    physical_to_logical: Int[np.ndarray, "L slots"]
    logical_to_physical: Int[np.ndarray, "L E most"]
    replicas: Int[np.ndarray, "L E"]


def rebalance_experts(
    load_LE: Int[np.ndarray, "L E"] | Float32[np.ndarray, "L E"],
    num_slots: int,
    num_groups: int = 1,
    num_nodes: int = 1,
    num_devices: int = 1,
) -> ReplicaMaps:
    """Replicate the heaviest experts and pack all replicas onto devices, equally many each.

    Where ``num_nodes`` divides ``num_groups``, groups of experts stay on one node (hierarchical policy); else nodes and
    groups are ignored (global policy). This rule is EPLB's own.

    Args:
        load_LE: rows of each expert, or an estimate.
        num_slots: replicas of a layer in all, a multiple of ``num_devices``.
        num_groups: groups of experts, in the sense of group-limited routing.
        num_nodes: nodes, a divisor of ``num_devices``.
        num_devices: devices.
    Fails: UserError for counts that do not divide or a load that is not finite or negative.
    Source: github.com/deepseek-ai/EPLB at d52c72d. Differs: among equal loads (the replicas of one expert are) the
    lowest index goes first; its torch sort is not stable and leaves that order open. Loads are float32 as there.
    """
    load_LE = np.asarray(load_LE, dtype=np.float32)
    _check(load_LE, num_slots, num_groups, num_nodes, num_devices)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    num_layers, num_experts = load_LE.shape
    expert_LE = _experts_by_node(load_LE, num_groups, num_nodes)
    per_node = num_experts // num_nodes
    load_NE = np.take_along_axis(load_LE, expert_LE, 1).reshape(-1, per_node)  # N: the nodes of all layers
    local_NP, copy_NP, replicas_NE = _replicate(load_NE, num_slots // num_nodes)
    load_NP = np.take_along_axis(load_NE / replicas_NE.astype(np.float32), local_NP, 1)
    bin_NP, place_NP = pack(load_NP, num_devices // num_nodes)
    physical_NP = _inverse(bin_NP * (num_slots // num_devices) + place_NP)
    node_L1N = np.arange(num_nodes).repeat(num_slots // num_nodes)[None] * per_node
    sorted_LP = np.take_along_axis(local_NP, physical_NP, 1).reshape(num_layers, num_slots) + node_L1N
    copy_LP = np.take_along_axis(copy_NP, physical_NP, 1).reshape(num_layers, num_slots)
    physical_to_logical = np.take_along_axis(expert_LE, sorted_LP, 1)
    replicas = np.take_along_axis(replicas_NE.reshape(num_layers, num_experts), _inverse(expert_LE), 1)
    logical_to_physical = np.full((num_layers, num_experts, replicas.max()), -1, dtype=np.int64)
    logical_to_physical[np.arange(num_layers)[:, None], physical_to_logical, copy_LP] = np.arange(num_slots)
    return ReplicaMaps(physical_to_logical, logical_to_physical, replicas)


def pack(load_XN: Float32[np.ndarray, "X N"], num_bins: int) -> tuple[Int[np.ndarray, "X N"], Int[np.ndarray, "X N"]]:
    """Pack N items into equally full bins, heaviest first, each into the lightest bin with room.

    Returns:
        the bin of each item, and its place in the bin.
    """
    num_rows, num_items = load_XN.shape
    per_bin = num_items // num_bins
    if per_bin == 1:
        return np.tile(np.arange(num_items), (num_rows, 1)), np.zeros((num_rows, num_items), dtype=np.int64)
    bin_XN = np.empty((num_rows, num_items), dtype=np.int64)
    place_XN = np.empty_like(bin_XN)
    weight_XM = np.zeros((num_rows, num_bins), dtype=np.float32)
    count_XM = np.zeros((num_rows, num_bins), dtype=np.int64)
    row_X = np.arange(num_rows)
    for item_X in np.argsort(-load_XN, axis=1, kind="stable").T:
        bin_X = np.where(count_XM < per_bin, weight_XM, np.inf).argmin(1)
        bin_XN[row_X, item_X] = bin_X
        place_XN[row_X, item_X] = count_XM[row_X, bin_X]
        weight_XM[row_X, bin_X] += load_XN[row_X, item_X]
        count_XM[row_X, bin_X] += 1
    return bin_XN, place_XN


def _experts_by_node(load_LE: Float32[np.ndarray, "L E"], num_groups: int, num_nodes: int) -> Int[np.ndarray, "L E"]:
    """The experts in the order of the nodes that get them, whole groups at a time."""
    num_layers, num_experts = load_LE.shape
    size = num_experts // num_groups
    node_LG, place_LG = pack(load_LE.reshape(num_layers, num_groups, size).sum(2), num_nodes)
    group_LG = _inverse(node_LG * (num_groups // num_nodes) + place_LG)
    return (group_LG[:, :, None] * size + np.arange(size)).reshape(num_layers, num_experts)


def _replicate(
    load_XE: Float32[np.ndarray, "X E"], num_slots: int
) -> tuple[Int[np.ndarray, "X P"], Int[np.ndarray, "X P"], Int[np.ndarray, "X E"]]:
    """One replica each, and every further one to the expert with the most load per replica.

    Returns:
        the expert of each replica, which of the expert's replicas it is, and how many each expert has.
    """
    num_rows, num_experts = load_XE.shape
    expert_XP = np.tile(np.arange(num_slots), (num_rows, 1))
    copy_XP = np.zeros_like(expert_XP)
    replicas_XE = np.ones((num_rows, num_experts), dtype=np.int64)
    row_X = np.arange(num_rows)
    for slot in range(num_experts, num_slots):
        expert_X = (load_XE / replicas_XE.astype(np.float32)).argmax(1)
        expert_XP[:, slot] = expert_X
        copy_XP[:, slot] = replicas_XE[row_X, expert_X]
        replicas_XE[row_X, expert_X] += 1
    return expert_XP, copy_XP, replicas_XE


def _inverse(order_XN: Int[np.ndarray, "X N"]) -> Int[np.ndarray, "X N"]:
    return np.argsort(order_XN, axis=1)


def _check(load_LE: np.ndarray, num_slots: int, num_groups: int, num_nodes: int, num_devices: int) -> None:
    require(load_LE.ndim == 2 and load_LE.size > 0, f"load_LE must be [layers, experts], but is {list(load_LE.shape)}.")
    require(bool(np.isfinite(load_LE).all() and load_LE.min() >= 0), "Loads must be finite and not negative.")
    num_experts = load_LE.shape[1]
    require(min(num_groups, num_nodes, num_devices) >= 1, "Groups, nodes and devices must be at least 1 each.")
    require(num_slots >= num_experts, f"{num_slots} slots cannot hold {num_experts} experts.")
    divides = num_slots % num_devices == 0
    require(divides, f"{num_slots} slots do not divide over {num_devices} devices: choose a multiple.")
    require(num_devices % num_nodes == 0, f"{num_devices} devices do not divide over {num_nodes} nodes.")
    require(num_experts % num_groups == 0, f"{num_experts} experts do not divide into {num_groups} groups.")
