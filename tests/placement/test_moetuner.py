from itertools import permutations, product

import numpy as np
import pytest
from brute_force import every_placement, is_placement, random_problem

from equipoise.placement import moetuner, traffic
from equipoise.placement.pack import pack


def deviation(problem, copy_EG) -> float:
    return float(np.abs(problem.loads(copy_EG) - 1).sum())


def transitions(seed: int, layers: int, experts: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.integers(0, 100, (layers - 1, experts, experts)) * draw.integers(0, 2, (layers - 1, experts, experts))


@pytest.mark.parametrize("seed", range(4))
def test_the_first_program_deviates_as_little_as_any_clustering(seed):
    problem = random_problem(seed, experts=6, devices=3, slots=2)
    clustered = moetuner.cluster(problem, pack(problem), 10.0)
    best = min(deviation(problem, copy_EG) for copy_EG in every_placement(problem))
    assert is_placement(problem, clustered)
    assert best - 1e-9 <= deviation(problem, clustered) <= best * (1 + moetuner.GAP) + 1e-9


@pytest.mark.parametrize("engine", ["highs", "cp_sat"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_the_second_program_names_clusters_as_well_as_any_names(nodes, engine):
    devices, experts = 4, 4
    cost_GG = traffic.link_costs(devices, nodes, 3.0)
    for seed in range(2):
        copies = np.array([pack(random_problem(seed + layer, experts, devices, 1)) for layer in range(2)])
        flow = transitions(seed, 2, experts)
        named = moetuner.name_clusters(copies, flow, cost_GG, engine, 20.0)
        best = min(
            moetuner.dearest(np.array([copies[0][:, one], copies[1][:, other]]), flow, cost_GG)
            for one, other in product(map(list, permutations(range(devices))), repeat=2)
        )
        assert best <= moetuner.dearest(named, flow, cost_GG) <= best * (1 + moetuner.GAP) + 1e-6


def time_of(problems, copies, flow, cost_GG) -> float:
    unit = flow.sum((1, 2), keepdims=True) / problems[0].devices
    fullest = sum(problem.value(one) for problem, one in zip(problems, copies))
    return fullest + moetuner.dearest(copies, flow / unit, cost_GG)


@pytest.mark.parametrize("seed", range(3))
def test_both_stages_at_once_are_as_good_as_anything(seed):
    problems = [random_problem(seed + layer, experts=4, devices=2, slots=2) for layer in range(3)]
    flow, cost_GG = transitions(seed, 3, 4), traffic.link_costs(2, 1, 8.0)
    start = np.array([pack(problem) for problem in problems])
    one_by_one = moetuner.name_clusters(start, flow, cost_GG, "highs", 10.0)
    joint = moetuner.jointly(problems, one_by_one, flow, cost_GG, 20.0)
    best = min(
        time_of(problems, np.array(copies), flow, cost_GG)
        for copies in product(*(list(every_placement(problem)) for problem in problems))
    )
    assert all(is_placement(problem, one) for problem, one in zip(problems, joint))
    assert time_of(problems, joint, flow, cost_GG) <= time_of(problems, one_by_one, flow, cost_GG) + 1e-9
    assert best - 1e-9 <= time_of(problems, joint, flow, cost_GG) <= best * (1 + moetuner.GAP) + 1e-9


def test_what_is_too_large_for_one_program_keeps_its_two_stages():
    problems = [random_problem(layer, experts=16, devices=4, slots=4) for layer in range(2)]
    start = np.array([pack(problem) for problem in problems])
    flow, cost_GG = transitions(0, 2, 16), traffic.link_costs(4, 1, 8.0)
    assert moetuner.jointly(problems, start, flow, cost_GG, 1.0) is start
