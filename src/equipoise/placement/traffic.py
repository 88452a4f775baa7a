"""What crosses links: tokens on their way from layer to layer, and tokens whose experts are on several nodes.

``part_LEG`` is how much of an expert's rows each device gets: 1 / copies where it holds one. ``cost_GG`` is what a
token costs on its way from one device to another.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Num
from scipy import optimize, sparse

from equipoise.placement.problem import Problem

Measure = Literal["total", "bottleneck"]
CopiesOfLayers = Bool[np.ndarray, "L E G"]
LEAST_GAIN = 1e-9


def link_costs(devices: int, nodes: int, inter_node: float) -> Float[np.ndarray, "G G"]:
    """0 on a device, 1 within a node, ``inter_node`` between nodes."""
    node_G = np.arange(devices) * nodes // devices
    cost_GG = np.where(node_G[:, None] == node_G, 1.0, inter_node)
    np.fill_diagonal(cost_GG, 0.0)
    return cost_GG


def node_apart(devices: int, nodes: int) -> Float[np.ndarray, "G G"]:
    """1 between devices of different nodes, else 0."""
    node_G = np.arange(devices) * nodes // devices
    return (node_G[:, None] != node_G).astype(float)


def parts(copy_LEG: CopiesOfLayers) -> Float[np.ndarray, "L E G"]:
    """How much of every expert's rows each device gets."""
    return copy_LEG / copy_LEG.sum(2, keepdims=True)


def flows(copy_LEG: CopiesOfLayers, transition_MEE: Num[np.ndarray, "M E E"]) -> Float[np.ndarray, "M G G"]:
    """Tokens that go from each device in one layer to each in the next, if they do not return home in between."""
    part_LEG = parts(copy_LEG)
    return np.einsum("mag,mab,mbh->mgh", part_LEG[:-1], transition_MEE, part_LEG[1:], optimize=True)


def remote_share(copy_LEG: CopiesOfLayers, transition_MEE: Num[np.ndarray, "M E E"], nodes: int) -> tuple[float, float]:
    """Shares of the transitions that leave the device, and that leave the node."""
    flow_GG = flows(copy_LEG, transition_MEE).sum(0)
    total = max(float(flow_GG.sum()), LEAST_GAIN)
    per_node = len(flow_GG) // nodes
    flow_NN = flow_GG.reshape(nodes, per_node, nodes, per_node).sum((1, 3))
    return 1 - float(np.trace(flow_GG)) / total, 1 - float(np.trace(flow_NN)) / total


def spread(copy_LEG: CopiesOfLayers, coactivation_LEE: Num[np.ndarray, "L E E"], nodes: int) -> float:
    """Share of the pairs of experts of one token that are on different nodes."""
    part_LEG = parts(copy_LEG)
    part_LEN = part_LEG.reshape(*part_LEG.shape[:2], nodes, -1).sum(3)
    together = np.einsum("lan,lab,lbn->", part_LEN, coactivation_LEE, part_LEN, optimize=True)
    return 1 - float(together) / max(float(coactivation_LEE.sum()), LEAST_GAIN)


def align(
    copy_LEG: CopiesOfLayers,
    transition_MEE: Num[np.ndarray, "M E E"],
    cost_GG: Float[np.ndarray, "G G"],
    measure: Measure = "total",
) -> CopiesOfLayers:
    """Rename every layer's devices so that its tokens cost least on their way from the layer before.

    With equal links this is the optimum, for a renaming is only seen relative to the layer before; with two levels of
    links each layer is the best after the one before it.

    Args:
        copy_LEG: which experts are together is kept.
        transition_MEE: tokens from expert to expert.
        cost_GG: of a token from device to device.
        measure: the sum of all costs, or that of the dearest pair of devices.
    Source: MoETuner (arXiv 2502.06643), second program. Differs: the printed maximum encloses a sum over all pairs;
    this one is over pairs of different devices (INFERRED). Solved by matchings, not by a general integer program.
    """
    aligned = copy_LEG.copy()
    for layer, transition_EE in enumerate(transition_MEE):
        before_EG, here_EG = parts(aligned[layer : layer + 1])[0], parts(copy_LEG[layer + 1 : layer + 2])[0]
        flow_GC = before_EG.T @ transition_EE @ here_EG
        if measure == "total":
            name_C = optimize.linear_sum_assignment(flow_GC.T @ cost_GG)[1]
        else:
            name_C = bottleneck_assignment((flow_GC.T[:, :, None] * cost_GG).max(1))
        aligned[layer + 1][:, name_C] = copy_LEG[layer + 1]
    return aligned


def bottleneck_assignment(cost_CG: Float[np.ndarray, "C G"]) -> Int[np.ndarray, " C"]:
    """One column for each row, so that the largest cost is as small as can be: bisection over perfect matchings."""
    levels = np.unique(cost_CG)
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        matched = sparse.csgraph.maximum_bipartite_matching(sparse.csr_array(cost_CG <= levels[middle]), "column")
        low, high = (low, middle) if (matched >= 0).all() else (middle + 1, high)
    graph = sparse.csr_array(cost_CG <= levels[low])
    return sparse.csgraph.maximum_bipartite_matching(graph, "column").astype(np.int64)


def follow(
    problems: list[Problem],
    copy_LEG: CopiesOfLayers,
    transition_MEE: Num[np.ndarray, "M E E"],
    cost_GG: Float[np.ndarray, "G G"],
    slack: float,
) -> CopiesOfLayers:
    """Swap experts so that tokens cost less from layer to layer; no value grows by more than ``slack``, relatively."""
    copy_LEG = copy_LEG.copy()
    limits = [problem.value(copy_EG) * (1 + slack) for problem, copy_EG in zip(problems, copy_LEG)]
    for _sweep in range(3):
        for layer, (problem, limit) in enumerate(zip(problems, limits)):
            part_LEG = parts(copy_LEG)
            pull_EG = np.zeros(copy_LEG.shape[1:])
            if layer > 0:
                pull_EG += transition_MEE[layer - 1].T @ part_LEG[layer - 1] @ cost_GG
            if layer < len(transition_MEE):
                pull_EG += transition_MEE[layer] @ part_LEG[layer + 1] @ cost_GG
            while _swap(problem, copy_LEG[layer], pull_EG, limit):
                pass
    return copy_LEG


def gather(
    problem: Problem, copy_EG: Bool[np.ndarray, "E G"], coactivation_EE: Num[np.ndarray, "E E"], slack: float
) -> Bool[np.ndarray, "E G"]:
    """Swap experts so that those which tokens visit together share nodes; the value grows by at most ``slack``."""
    copy_EG = copy_EG.copy()
    limit = problem.value(copy_EG) * (1 + slack)
    apart_GG = node_apart(problem.devices, problem.nodes)
    pair_EE = coactivation_EE / copy_EG.sum(1)
    while _swap(problem, copy_EG, pair_EE @ copy_EG @ apart_GG, limit, pair_EE):
        pass
    return copy_EG


def _swap(
    problem: Problem,
    copy_EG: Bool[np.ndarray, "E G"],
    pull_EG: Float[np.ndarray, "E G"],
    limit: float,
    pair_EE: Float[np.ndarray, "E E"] | None = None,
) -> bool:
    """The swap that saves most, if any does and keeps the loads below the limit.

    Args:
        problem: one layer.
        copy_EG: changed in place.
        pull_EG: what expert e's rows cost if they all were on device g.
        limit: of every device's load.
        pair_EE: where the experts of one layer cost each other if they are on different nodes: by how much.
    """
    count_E = copy_EG.sum(1)
    expert, device = np.nonzero(copy_EG)
    moved_PP = (pull_EG / count_E[:, None])[expert][:, device]
    saved_PP = np.diag(moved_PP)[:, None] - moved_PP
    saved_PP = saved_PP + saved_PP.T
    if pair_EE is not None:  # each was moved to where the other no longer is: they stay as far apart as they were
        node = device * problem.nodes // problem.devices
        saved_PP -= 2 * (pair_EE / count_E[:, None])[expert][:, expert] * (node[:, None] != node)
    taken_PP = copy_EG[expert][:, device]
    least = LEAST_GAIN * max(1.0, float(np.abs(moved_PP).max()))  # less than this is rounding, and would go on for ever
    one, other = np.nonzero(np.triu((saved_PP > least) & ~taken_PP & ~taken_PP.T))
    weight_WE = problem.share_WE / count_E
    load_WG, change = weight_WE @ copy_EG, weight_WE[:, expert[other]] - weight_WE[:, expert[one]]
    fullest = np.maximum(load_WG[:, device[one]] + change, load_WG[:, device[other]] - change).max(0, initial=0.0)
    fits = fullest <= limit
    if not fits.any():
        return False
    best = np.flatnonzero(fits)[saved_PP[one[fits], other[fits]].argmax()]
    i, j = one[best], other[best]
    copy_EG[expert[[i, j]], device[[i, j]]] = False
    copy_EG[expert[[i, j]], device[[j, i]]] = True
    return True
