from itertools import product

import numpy as np
import pytest
from brute_force import every_placement, fullest, optimum, random_problem

from equipoise.placement.problem import Problem, replicate, shares

SHAPES = [(6, 3, 2, 1), (4, 3, 2, 1), (5, 2, 3, 3), (4, 4, 2, 2), (4, 4, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_the_bound_holds_and_the_value_is_the_fullest_device(shape, seed):
    problem = random_problem(seed, *shape)
    assert problem.bound <= optimum(problem) + 1e-12
    for copy_EG in list(every_placement(problem))[::17]:
        assert problem.value(copy_EG) == pytest.approx(fullest(problem, copy_EG))


def test_the_bound_is_the_optimum_where_one_expert_or_a_pigeonhole_decides():
    heavy = Problem(np.array([[3.0, 0.5, 0.3, 0.2]]), 2, 2)
    assert heavy.bound == pytest.approx(3.0 + 0.2) == pytest.approx(optimum(heavy))
    # Three large ones on two devices: two of them meet.
    crowded = Problem(np.array([[0.6, 0.6, 0.6, 0.2]]), 2, 2)
    assert crowded.bound == pytest.approx(1.2) == pytest.approx(optimum(crowded))


def test_replicas_go_where_the_largest_copy_becomes_smallest():
    for seed in range(5):
        weight_E = np.random.default_rng(seed).lognormal(size=4)
        count_E = replicate(weight_E, 3, 3)
        best = min((weight_E / np.array(counts)).max() for counts in product(range(1, 4), repeat=4) if sum(counts) == 7)
        assert count_E.sum() == 7
        assert count_E.max() <= 3
        assert (weight_E / count_E).max() == pytest.approx(best)


def test_shares_count_in_mean_device_loads_and_leave_out_empty_windows():
    load_WE = np.array([[6, 2, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_allclose(shares(load_WE, 2), [[1.5, 0.5, 0, 0], [0.5] * 4])
    np.testing.assert_allclose(shares(load_WE[1:2], 2), [[0.5] * 4])
