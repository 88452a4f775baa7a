"""Oracles: every placement there is, for sizes that are small enough."""

from collections.abc import Iterator
from itertools import combinations, product

import numpy as np

from equipoise.placement.problem import Problem


def every_placement(problem: Problem) -> Iterator[np.ndarray]:
    """All ``copy_EG`` that hold every expert, keep groups on one node, and have no expert twice on a device."""
    E, G = problem.num_experts, problem.devices
    for held in product(combinations(range(E), problem.slots), repeat=G):
        copy_EG = np.zeros((E, G), bool)
        for device, experts in enumerate(held):
            copy_EG[list(experts), device] = True
        if copy_EG.any(1).all() and _groups_together(problem, copy_EG):
            yield copy_EG


def optimum(problem: Problem) -> float:
    return min(fullest(problem, copy_EG) for copy_EG in every_placement(problem))


def fullest(problem: Problem, copy_EG: np.ndarray) -> float:
    """The fullest device's load, added up expert by expert."""
    worst = 0.0
    for share_E in problem.share_WE:
        for device in range(problem.devices):
            held = [e for e in range(problem.num_experts) if copy_EG[e, device]]
            worst = max(worst, sum(share_E[e] / copy_EG[e].sum() for e in held))
    return worst


def is_placement(problem: Problem, copy_EG: np.ndarray) -> bool:
    full = (copy_EG.sum(0) == problem.slots).all() and copy_EG.any(1).all()
    return bool(full) and _groups_together(problem, copy_EG)


def random_problem(seed: int, experts: int, devices: int, slots: int, windows: int = 1, **rules: int) -> Problem:
    draw = np.random.default_rng(seed)
    load_WE = draw.lognormal(sigma=1.0, size=(windows, experts))
    return Problem(load_WE / load_WE.sum(1, keepdims=True) * devices, devices, slots, **rules)


def _groups_together(problem: Problem, copy_EG: np.ndarray) -> bool:
    if problem.groups == 1:
        return True
    size = problem.num_experts // problem.groups
    node_EN = copy_EG.reshape(len(copy_EG), problem.nodes, -1).any(2)
    group_XN = node_EN.reshape(problem.groups, size, -1).any(1)
    return bool((group_XN.sum(1) == 1).all())
