import sys

import numpy as np
import pytest
from brute_force import is_placement, optimum, random_problem

from equipoise.errors import UserError
from equipoise.placement.exact import Solution, improve_exactly
from equipoise.placement.pack import _heaviest_first
from equipoise.placement.problem import Problem

SHAPES = [
    {"experts": 6, "devices": 3, "slots": 2},
    {"experts": 6, "devices": 2, "slots": 3, "windows": 3},
    {"experts": 4, "devices": 3, "slots": 2},
    {"experts": 4, "devices": 3, "slots": 3, "windows": 2},
    {"experts": 8, "devices": 2, "slots": 4, "nodes": 2, "groups": 4},
    {"experts": 4, "devices": 4, "slots": 2, "nodes": 2, "groups": 4},
]


def start_of(problem: Problem) -> Solution:
    """The worst of a few placements, so that there is something to improve."""
    draw = np.random.default_rng(0)
    copies = _heaviest_first(problem) if problem.groups == 1 else in_order(problem)
    if problem.groups == 1:
        order = draw.permutation(problem.devices)
        copies = copies[:, order]
    return Solution(copies, problem.value(copies), problem.bound, "start")


def in_order(problem: Problem) -> np.ndarray:
    per_node, slots = problem.devices // problem.nodes, problem.slots
    copies = np.zeros((problem.num_experts, problem.devices), bool)
    size = problem.num_experts // problem.nodes
    for device in range(problem.devices):
        first = device // per_node * size + device % per_node * slots % size
        for slot in range(slots):
            copies[device // per_node * size + (first + slot) % size, device] = True
    return copies


@pytest.mark.parametrize("engine", ["highs", "cp_sat"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_solvers_find_and_prove_what_trying_everything_finds(shape, engine):
    for seed in range(3):
        problem = random_problem(seed, **shape)
        solution = improve_exactly(problem, start_of(problem), engine, seconds=20.0)
        best = optimum(problem)
        assert is_placement(problem, solution.copy_EG)
        assert solution.value == pytest.approx(best, rel=1e-5)
        assert best * (1 - 1e-4) <= solution.bound <= best + 1e-9
        assert solution.gap < 1e-4


@pytest.mark.parametrize("engine", ["highs", "cp_sat"])
def test_an_optimal_start_stays(engine):
    problem = random_problem(1, experts=6, devices=3, slots=2)
    first = improve_exactly(problem, start_of(problem), engine, seconds=20.0)
    again = improve_exactly(problem, first, engine, seconds=20.0)
    assert again.value == first.value
    assert again.gap < 1e-4


@pytest.mark.parametrize("engine", ["highs", "cp_sat"])
def test_without_time_the_start_is_the_answer(engine):
    problem = random_problem(0, experts=60, devices=6, slots=11, windows=3)
    start = start_of(problem)
    solution = improve_exactly(problem, start, engine, seconds=0.01)
    assert solution.value <= start.value
    assert solution.bound >= problem.bound


def test_without_ortools_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ortools", None)
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    problem = random_problem(0, experts=6, devices=3, slots=2)
    with pytest.raises(UserError, match=r"equipoise\[place\]"):
        improve_exactly(problem, start_of(problem), "cp_sat", seconds=1.0)
