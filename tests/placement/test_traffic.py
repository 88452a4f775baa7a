from itertools import permutations

import numpy as np
import pytest
from brute_force import is_placement, random_problem

from equipoise.placement import traffic
from equipoise.placement.pack import pack


def random_case(seed: int, devices: int, slots: int, layers: int = 3):
    """Problems, a placement without replicas, and transitions that prefer partners."""
    draw = np.random.default_rng(seed)
    experts = devices * slots
    problems = [random_problem(seed + layer, experts, devices, slots) for layer in range(layers)]
    copies = np.array([pack(problem) for problem in problems])
    transition = draw.integers(0, 20, (layers - 1, experts, experts))
    for matrix in transition:
        matrix[np.arange(experts), draw.permutation(experts)] += 200
    return problems, copies, transition


def cost_of(copies: np.ndarray, transition: np.ndarray, cost_GG: np.ndarray, measure: str) -> float:
    """Expert by expert."""
    total = 0.0
    for layer, matrix in enumerate(transition):
        pairs = np.zeros_like(cost_GG)
        for a, b in np.ndindex(matrix.shape):
            for g in np.flatnonzero(copies[layer, a]):
                for h in np.flatnonzero(copies[layer + 1, b]):
                    share = copies[layer, a].sum() * copies[layer + 1, b].sum()
                    pairs[g, h] += matrix[a, b] / share * cost_GG[g, h]
        total += pairs.sum() if measure == "total" else pairs.max()
    return total


def test_links_cost_nothing_on_a_device_and_more_between_nodes():
    expected = [[0, 1, 8, 8], [1, 0, 8, 8], [8, 8, 0, 1], [8, 8, 1, 0]]
    np.testing.assert_array_equal(traffic.link_costs(4, 2, 8.0), expected)


def test_shares_that_leave_the_device_and_the_node_by_hand():
    copies = np.array([np.eye(4, dtype=bool), np.eye(4, dtype=bool)])
    transition = np.diag([4, 0, 0, 0])[None] + np.eye(4, k=1, dtype=int)[None] * np.array([2, 3, 1, 0])[:, None]
    # 4 stay; 0 -> 1 (2) and 2 -> 3 (1) within nodes; 1 -> 2 (3) between them.
    assert traffic.remote_share(copies, transition, 2) == pytest.approx((0.6, 0.3))
    everywhere = np.ones((2, 4, 4), bool)  # four copies of each: any device is the next one
    assert traffic.remote_share(everywhere, transition, 2) == pytest.approx((0.75, 0.5))


@pytest.mark.parametrize("measure", ["total", "bottleneck"])
@pytest.mark.parametrize("seed", range(3))
def test_with_equal_links_renaming_finds_the_best_of_all_names(measure, seed):
    _, copies, transition = random_case(seed, devices=3, slots=2)
    cost_GG = traffic.link_costs(3, 1, 8.0)
    aligned = traffic.align(copies, transition, cost_GG, measure)
    best = min(
        cost_of(np.array([copies[0], copies[1][:, one], copies[2][:, other]]), transition, cost_GG, measure)
        for one in map(list, permutations(range(3)))
        for other in map(list, permutations(range(3)))
    )
    assert cost_of(aligned, transition, cost_GG, measure) == pytest.approx(best)
    assert sorted(map(tuple, aligned[1].T)) == sorted(map(tuple, copies[1].T))


def test_the_bottleneck_assignment_is_the_best_of_all():
    for seed in range(10):
        cost = np.random.default_rng(seed).integers(0, 30, (5, 5)).astype(float)
        chosen = traffic.bottleneck_assignment(cost)
        assert sorted(chosen) == list(range(5))
        best = min(cost[np.arange(5), list(names)].max() for names in permutations(range(5)))
        assert cost[np.arange(5), chosen].max() == best


@pytest.mark.parametrize("seed", range(3))
def test_following_costs_less_and_keeps_the_balance(seed):
    problems, copies, transition = random_case(seed, devices=4, slots=3)
    cost_GG = traffic.link_costs(4, 2, 8.0)
    followed = traffic.follow(problems, copies, transition, cost_GG, slack=0.1)
    before, after = (cost_of(one, transition, cost_GG, "total") for one in (copies, followed))
    assert after < 0.8 * before
    for problem, old, new in zip(problems, copies, followed):
        assert is_placement(problem, new)
        assert problem.value(new) <= problem.value(old) * 1.1 + 1e-9


def apart(copy_EG: np.ndarray, coactivation_EE: np.ndarray, nodes: int) -> float:
    node_EN = copy_EG.reshape(len(copy_EG), nodes, -1).sum(2) / copy_EG.sum(1, keepdims=True)
    return float((coactivation_EE * (1 - node_EN @ node_EN.T)).sum())


@pytest.mark.parametrize("scale", [1, 10**12 + 39])  # counts so large that sums of them are rounded
@pytest.mark.parametrize("slots", [2, 3])
def test_gathering_brings_the_experts_of_a_token_together(slots, scale):
    problem = random_problem(1, experts=8, devices=4, slots=slots, nodes=2)
    copies = pack(problem)
    draw = np.random.default_rng(0)
    pairs = draw.integers(0, 50, (8, 8)) * scale
    pairs = np.triu(pairs, 1) + np.triu(pairs, 1).T
    gathered = traffic.gather(problem, copies, pairs, slack=0.3)
    assert is_placement(problem, gathered)
    assert problem.value(gathered) <= problem.value(copies) * 1.3 + 1e-9
    assert apart(gathered, pairs, 2) < apart(copies, pairs, 2)
    share = traffic.spread(gathered[None], pairs[None], 2)
    assert share == pytest.approx(apart(gathered, pairs, 2) / pairs.sum())


@pytest.mark.parametrize("slots", [2, 3])
def test_the_chosen_swap_is_the_one_that_saves_most(slots):
    problem = random_problem(2, experts=8, devices=4, slots=slots, nodes=2)
    copies = pack(problem)
    pairs = np.random.default_rng(3).integers(0, 50, (8, 8))
    pairs = np.triu(pairs, 1) + np.triu(pairs, 1).T
    weight_EE = pairs / copies.sum(1)
    swapped = copies.copy()
    pull_EG = weight_EE @ copies @ traffic.node_apart(4, 2)
    assert traffic._swap(problem, swapped, pull_EG, np.inf, weight_EE)
    best = apart(copies, pairs, 2)
    for (a, g), (b, h) in every_swap(copies):
        other = copies.copy()
        other[[a, b], [g, h]], other[[a, b], [h, g]] = False, True
        best = min(best, apart(other, pairs, 2))
    assert apart(swapped, pairs, 2) == pytest.approx(best)


def every_swap(copies: np.ndarray) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    held = list(zip(*np.nonzero(copies)))
    return [((a, g), (b, h)) for a, g in held for b, h in held if not copies[a, h] and not copies[b, g]]
