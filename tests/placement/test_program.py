from itertools import product

import numpy as np
import pytest

from equipoise.placement.program import Answer, Engine, Program


def solved(weights: np.ndarray, rooms: int, engine: Engine) -> tuple[Answer, np.ndarray]:
    """Weights into rooms, at least one in each, so that the fullest room is as empty as can be."""
    program = Program(limit=float(weights.sum()))
    inside = program.variables(len(weights), rooms)
    fullest = program.variables(1, binary=False)
    program.minimise(fullest, 2.0)
    for row in inside:
        program.add([(1, row)], 1, 1)
    for column in inside.T:
        program.add([(1, column)], low=1)
        program.add([(weights, column), (-1, fullest)], high=0)
    answer = program.solve(engine, 20.0)
    assert answer.values is not None
    return answer, answer.values[inside] > 0.5


@pytest.mark.parametrize("engine", ["highs", "cp_sat"])
@pytest.mark.parametrize("seed", range(4))
def test_the_answer_is_the_best_of_all_and_its_bound_is_below(seed, engine):
    weights = np.random.default_rng(seed).lognormal(size=6)
    answer, inside = solved(weights, 3, engine)
    every = (np.array(rooms) for rooms in product(range(3), repeat=6) if len(set(rooms)) == 3)
    best = min(np.bincount(rooms, weights, 3).max() for rooms in every)
    assert (inside.sum(1) == 1).all()
    assert inside.any(0).all()
    assert (weights @ inside).max() == pytest.approx(best, rel=1e-5)
    assert best - 1e-4 <= answer.bound / 2 <= best + 1e-9


@pytest.mark.parametrize("engine", ["highs", "cp_sat"])
def test_what_has_no_solution_has_no_values(engine):
    program = Program(limit=1.0)
    one = program.variables(2)
    program.minimise(program.variables(1, binary=False))
    program.add([(1, one)], 3, 3)
    assert program.solve(engine, 5.0).values is None
