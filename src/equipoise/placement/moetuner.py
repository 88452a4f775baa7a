"""MoETuner (arXiv 2502.06643): two integer programs, balance within layers and then traffic between them.

Repairs to what is printed, which is not solvable as it stands (INFERRED): every expert is placed once; all devices
hold equally many experts of each layer; a pair of layers costs what its dearest pair of different devices does.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Num

from equipoise.placement.exact import hold
from equipoise.placement.problem import Problem
from equipoise.placement.program import Engine, Program
from equipoise.placement.traffic import CopiesOfLayers, align, flows

GAP = 0.025  # the paper's, for both programs
JOINT_SIZE = 4000  # pairs of experts times pairs of devices up to which one program for both stages is worth a try
NAMING_SIZE = 30000


def cluster(problem: Problem, start: Bool[np.ndarray, "E G"], seconds: float) -> Bool[np.ndarray, "E G"]:
    """The first program: experts of one layer to clusters, so that their loads deviate least from the mean, in sum.

    Without an answer in time, ``start``.
    Source: MoETuner, ILP 1. Differs: each expert in one cluster, equal sizes; several windows add up.
    """
    program = Program(limit=float(problem.devices))
    held_EG = hold(program, problem)
    for share_E in problem.share_WE:
        off_G = program.variables(problem.devices, binary=False)
        program.minimise(off_G)
        for held_E, off in zip(held_EG.T, off_G):
            program.add([(share_E, held_E), (-1, off)], high=1)  # what is above the mean is half of all deviations
    values = program.solve("highs", seconds, GAP).values
    return start if values is None else values[held_EG] > 0.5


def name_clusters(
    copy_LEG: CopiesOfLayers,
    transition_MEE: Num[np.ndarray, "M E E"],
    cost_GG: Float[np.ndarray, "G G"],
    engine: Engine,
    seconds: float,
) -> CopiesOfLayers:
    """The second program: clusters to devices, so that the dearest pair of devices costs least, summed over layers.

    Equal links need no program: matchings give the optimum. Neither does a size that no program could do in time.
    """
    start = align(copy_LEG, transition_MEE, cost_GG, "bottleneck")
    M, G, _ = (flow_MGG := flows(copy_LEG, transition_MEE)).shape
    remote = cost_GG[~np.eye(G, dtype=bool)]
    if M * G**4 > NAMING_SIZE or len(np.unique(remote)) < 2:
        return start
    program = Program(limit=float((flow_MGG / max(1.0, flow_MGG.max())).max() * cost_GG.max()))
    named_LCG, dearest_M = program.variables(M + 1, G, G), program.variables(M, binary=False)
    program.minimise(dearest_M)
    for named_CG in named_LCG:
        for one in range(G):
            program.add([(1, named_CG[one])], 1, 1)
            program.add([(1, named_CG[:, one])], 1, 1)
    for m, a, b, g, h in np.ndindex(M, G, G, G, G):
        price = flow_MGG[m, a, b] / max(1.0, flow_MGG.max()) * cost_GG[g, h]
        if price > 0:
            terms = [(price, named_LCG[m, a, g]), (price, named_LCG[m + 1, b, h]), (-1, dearest_M[m])]
            program.add(terms, high=float(price))
    values = program.solve(engine, seconds, GAP).values
    if values is None:
        return start
    named = np.einsum("lec,lcg->leg", copy_LEG, values[named_LCG] > 0.5)
    return min((start, named), key=lambda one: dearest(one, transition_MEE, cost_GG))


def dearest(
    copy_LEG: CopiesOfLayers, transition_MEE: Num[np.ndarray, "M E E"], cost_GG: Float[np.ndarray, "G G"]
) -> float:
    """What the dearest pair of devices costs, summed over the pairs of layers."""
    return float((flows(copy_LEG, transition_MEE) * cost_GG).max((1, 2), initial=0.0).sum())


def jointly(
    problems: list[Problem],
    start: CopiesOfLayers,
    transition_MEE: Num[np.ndarray, "M E E"],
    cost_GG: Float[np.ndarray, "G G"],
    seconds: float,
) -> CopiesOfLayers:
    """Both stages in one program: the fullest device's load plus the dearest pair's traffic, summed over layers.

    Both are counted in mean device loads, so that a cost of 1 says that to move a row takes as long as to compute it.
    Never worse than ``start``, which is also the answer where the program would be too large (``JOINT_SIZE``).

    Source: ours. MoETuner solves one stage after the other.
    """
    L, E, G = start.shape
    if (L - 1) * (E * G) ** 2 > JOINT_SIZE:
        return start
    unit = transition_MEE.sum((1, 2), keepdims=True).clip(min=1) / G
    program = Program(limit=G * max(1.0, float(cost_GG.max())))
    held_LEG = program.variables(L, E, G)
    for problem, held_EG in zip(problems, held_LEG):
        _balance(program, problem, held_EG)
    for rate_EE, here_EG, next_EG in zip(transition_MEE / unit, held_LEG, held_LEG[1:]):
        _traffic(program, rate_EE, (here_EG, next_EG), cost_GG)
    values = program.solve("highs", seconds, GAP).values
    if values is None:
        return start

    def time(copy_LEG: CopiesOfLayers) -> float:
        fullest = sum(problem.value(copy_EG) for problem, copy_EG in zip(problems, copy_LEG))
        return fullest + dearest(copy_LEG, transition_MEE / unit, cost_GG)

    return min((start, values[held_LEG] > 0.5), key=time)


def _balance(program: Program, problem: Problem, held_EG: np.ndarray) -> None:
    fullest = program.variables(1, binary=False)
    program.minimise(fullest)
    for held_G in held_EG:
        program.add([(1, held_G)], 1, 1)
    for held_E in held_EG.T:
        program.add([(1, held_E)], problem.slots, problem.slots)
        for share_E in problem.share_WE:
            program.add([(share_E, held_E), (-1, fullest)], high=0)


def _traffic(
    program: Program,
    rate_EE: Float[np.ndarray, "E E"],
    held: tuple[np.ndarray, np.ndarray],
    cost_GG: Float[np.ndarray, "G G"],
) -> None:
    """A variable "a is here and b there" per pair with traffic, tied from above and below, so that bounds are tight."""
    (here_EG, next_EG), (E, G) = held, held[0].shape
    dearest_pair = program.variables(1, binary=False)
    program.minimise(dearest_pair)
    both_EEGG = program.variables(E, E, G, G)
    for a, b in zip(*np.nonzero(rate_EE)):
        for g in range(G):
            program.add([(1, both_EEGG[a, b, g]), (-1, here_EG[a, g])], 0, 0)
            program.add([(1, both_EEGG[a, b, :, g]), (-1, next_EG[b, g])], 0, 0)
    for g, h in np.ndindex(G, G):
        if cost_GG[g, h] > 0:
            program.add([(rate_EE * cost_GG[g, h], both_EEGG[:, :, g, h]), (-1, dearest_pair)], high=0)


def both_stages(
    problems: list[Problem],
    start: CopiesOfLayers,
    transition_MEE: Num[np.ndarray, "M E E"],
    cost_GG: Float[np.ndarray, "G G"],
    seconds: float,
) -> CopiesOfLayers:
    """Cluster every layer, name the clusters, and where it is small enough improve on both at once.

    Args:
        problems: one per layer, without replicas and groups.
        start: the answer where a program finds none in time.
        transition_MEE: tokens from expert to expert of the next layer.
        cost_GG: of a token from device to device.
        seconds: for each program.
    """
    clustered = np.array([cluster(problem, copy_EG, seconds) for problem, copy_EG in zip(problems, start)])
    named = name_clusters(clustered, transition_MEE, cost_GG, "highs", seconds)
    return jointly(problems, named, transition_MEE, cost_GG, seconds)
