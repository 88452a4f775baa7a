from itertools import product

import numpy as np
import pytest
from brute_force import is_placement, random_problem

from equipoise.placement.hedge import POWER, SLACK, hedge
from equipoise.placement.pack import pack
from equipoise.placement.problem import Problem


def test_the_other_windows_gain_where_the_worst_one_does_not_care():
    # Expert 0 decides; beside it expert 3 is as good as expert 2 in window 0, and better in window 1.
    problem = Problem(np.array([[1.6, 0.2, 0.1, 0.1], [1.0, 0.2, 0.7, 0.1]]), 2, 2)
    poor = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], bool)
    hedged = hedge(problem, poor)
    assert problem.value(hedged) == pytest.approx(problem.value(poor)) == pytest.approx(1.7)
    np.testing.assert_array_equal(hedged[0], hedged[3])
    assert problem.loads(hedged)[1].max() == pytest.approx(1.1)
    assert problem.loads(poor)[1].max() == pytest.approx(1.7)


@pytest.mark.parametrize("seed", range(5))
def test_the_worst_window_stays_within_the_slack_and_the_sum_falls(seed):
    problem = random_problem(seed, experts=24, devices=4, slots=7, windows=5)
    before = pack(problem)
    after = hedge(problem, before)
    assert is_placement(problem, after)
    assert problem.value(after) <= problem.value(before) * (1 + SLACK) + 1e-12
    assert (problem.loads(after) ** POWER).sum() <= (problem.loads(before) ** POWER).sum()
    limit = problem.value(before) * (1 + SLACK)
    hot = int((problem.loads(after) ** POWER).sum(0).argmax())
    for (a, g), (b, h) in product(zip(*np.nonzero(after)), repeat=2):
        if g == hot and not after[a, h] and not after[b, g]:
            other = after.copy()
            other[[a, b], [g, h]], other[[a, b], [h, g]] = False, True
            better = (problem.loads(other) ** POWER).sum() < (problem.loads(after) ** POWER).sum() * (1 - 1e-6)
            assert not better or problem.value(other) > limit - 1e-9
