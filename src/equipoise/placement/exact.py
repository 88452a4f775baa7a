"""The best placement of one layer, as an integer program."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int

from equipoise.placement.problem import Problem
from equipoise.placement.program import Engine, Program

Copies = Bool[np.ndarray, "E G"]


@dataclass(frozen=True)
class Solution:
    """A layer's placement, what is proven of it, and who found it."""

    copy_EG: Copies
    value: float
    bound: float
    solver: str

    @property
    def gap(self) -> float:
        """How far above the bound, relatively: 0 is proven optimal."""
        return max(0.0, self.value / self.bound - 1)


def improve_exactly(problem: Problem, start: Solution, engine: Engine, seconds: float) -> Solution:
    """The optimum if it is found in time, at least what the search proved; never worse than ``start``."""
    program = Program(limit=start.value * (1 + 1e-6))
    held_EG = hold(program, problem)
    fullest = program.variables(1, binary=False)
    program.minimise(fullest)
    for load_G in _loads(program, problem, held_EG):
        for terms in load_G:
            program.add([*terms, (-1, fullest)], high=0)
    program.add([(1, fullest)], low=problem.bound)
    answer = program.solve(engine, seconds)
    bound = max(start.bound, min(answer.bound, start.value))
    found = None if answer.values is None else answer.values[held_EG] > 0.5
    if found is not None and problem.value(found) < start.value:
        return Solution(found, problem.value(found), min(bound, problem.value(found)), engine)
    return Solution(start.copy_EG, start.value, bound, start.solver)


def hold(program: Program, problem: Problem) -> Int[np.ndarray, "E G"]:
    """Variables "device g holds expert e", with the rules that every placement of a layer obeys."""
    E, G = problem.num_experts, problem.devices
    held_EG = program.variables(E, G)
    for held_E in held_EG.T:
        program.add([(1, held_E)], problem.slots, problem.slots)
    for held_G in held_EG:
        program.add([(1, held_G)], 1, problem.most_copies)
    if problem.groups > 1:
        _keep_groups(program, problem, held_EG)
    else:
        _break_symmetry(program, problem, held_EG)
    return held_EG


def _keep_groups(program: Program, problem: Problem, held_EG: Int[np.ndarray, "E G"]) -> None:
    """Every group is on one node, and every node has as many of them."""
    home_XN = program.variables(problem.groups, problem.nodes)
    for home_N in home_XN:
        program.add([(1, home_N)], 1, 1)
    for home_X in home_XN.T:
        program.add([(1, home_X)], problem.groups // problem.nodes, problem.groups // problem.nodes)
    size, per_node = problem.num_experts // problem.groups, problem.devices // problem.nodes
    for expert, held_G in enumerate(held_EG):
        for device, held in enumerate(held_G):
            program.add([(1, held), (-1, home_XN[expert // size, device // per_node])], high=0)


def _break_symmetry(program: Program, problem: Problem, held_EG: Int[np.ndarray, "E G"]) -> None:
    """Devices are alike: the n-th heaviest expert needs none but the first n; with replicas only the first is tied."""
    heaviest = np.argsort(-problem.share_WE.max(0), kind="stable")
    if problem.replicas:
        first_G = held_EG[heaviest[0]]
        for before, after in pairwise(first_G):
            program.add([(1, after), (-1, before)], high=0)
        return
    for rank, expert in enumerate(heaviest[: problem.devices - 1]):
        program.add([(1, held_EG[expert, rank + 1 :])], 0, 0)


Terms = list[tuple[Float[np.ndarray, "..."], Int[np.ndarray, "..."]]]


def _loads(program: Program, problem: Problem, held_EG: Int[np.ndarray, "E G"]) -> list[list[Terms]]:
    """The load of each window and device, as terms."""
    if not problem.replicas:
        return [[[(share_E, held_E)] for held_E in held_EG.T] for share_E in problem.share_WE]
    part_CEG = _parts(program, problem, held_EG)
    count_C = np.arange(1, len(part_CEG) + 1)
    return [
        [[(share_E / count_C[:, None], part_CEG[:, :, device])] for device in range(problem.devices)]
        for share_E in problem.share_WE
    ]


def _parts(program: Program, problem: Problem, held_EG: Int[np.ndarray, "E G"]) -> Int[np.ndarray, "C E G"]:
    """Variables "device g holds one of exactly c copies of expert e": an expert's load is divided by its copies."""
    most, (E, G) = problem.most_copies, held_EG.shape
    exactly_CE, part_CEG = program.variables(most, E), program.variables(most, E, G)
    for expert in range(E):
        program.add([(1, exactly_CE[:, expert])], 1, 1)
        for count in range(most):
            program.add([(1, part_CEG[count, expert]), (-(count + 1), exactly_CE[count, expert])], 0, 0)
        for device in range(G):
            program.add([(1, part_CEG[:, expert, device]), (-1, held_EG[expert, device])], 0, 0)
    return part_CEG
