import numpy as np
import pytest
from brute_force import fullest, is_placement, optimum, random_problem

from equipoise.placement.pack import _after_exchange, _heaviest_first, _shake, pack
from equipoise.placement.problem import Problem

SHAPES = [
    {"experts": 6, "devices": 3, "slots": 2},
    {"experts": 6, "devices": 2, "slots": 3, "windows": 3},
    {"experts": 5, "devices": 3, "slots": 3},
    {"experts": 4, "devices": 4, "slots": 3, "windows": 2},
    {"experts": 4, "devices": 4, "slots": 2, "nodes": 2, "groups": 2},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_is_a_placement_and_close_to_the_optimum(shape):
    ratios = []
    for seed in range(5):
        problem = random_problem(seed, **shape)
        copy_EG = pack(problem)
        assert is_placement(problem, copy_EG)
        ratios.append(fullest(problem, copy_EG) / optimum(problem))
    assert min(ratios) >= 1 - 1e-12
    assert max(ratios) < 1.12
    assert np.median(ratios) < 1.03


def test_swaps_mend_what_heaviest_first_leaves():
    problem = Problem(np.array([[7.0, 6, 5, 4, 3, 1]]) * 2 / 26, 2, 3)  # 13 and 13 are possible
    hard = Problem(np.array([[3.0, 3, 2, 2, 2, 0]]) / 6, 2, 3)  # 3 + 3 + 0 and 2 + 2 + 2
    for one in (problem, hard):
        assert one.value(pack(one)) == pytest.approx(1.0)
    assert hard.value(_heaviest_first(hard)) > 1.1


def test_every_device_may_hold_every_expert():
    problem = random_problem(0, experts=5, devices=4, slots=5)
    assert pack(problem).all()


@pytest.mark.parametrize("seed", range(10))
def test_room_is_made_for_copies_that_no_longer_fit(seed):
    draw = np.random.default_rng(seed)
    experts, devices = int(draw.integers(2, 7)), int(draw.integers(2, 7))
    slots = int(draw.integers(-(-experts // devices), experts + 1))
    problem = random_problem(seed, experts, devices, slots)
    assert is_placement(problem, _heaviest_first(problem))


def test_what_an_exchange_of_replicas_would_give_is_what_it_gives():
    problem = random_problem(3, experts=5, devices=4, slots=3, windows=2)
    copy_EG = _heaviest_first(problem)
    spare, device = np.nonzero(copy_EG & (copy_EG.sum(1) > 1)[:, None])
    more = int(np.flatnonzero(copy_EG.sum(1) == 1)[0])
    fits = ~copy_EG[more, device]
    assert fits.any()
    foreseen = _after_exchange(problem.share_WE, copy_EG, problem.loads(copy_EG), more, (spare[fits], device[fits]))
    for value, lost, place in zip(foreseen, spare[fits], device[fits]):
        after = copy_EG.copy()
        after[more, place], after[lost, place] = True, False
        assert value == pytest.approx(fullest(problem, after))


def test_shaking_keeps_a_placement_and_the_seed_decides():
    problem = random_problem(5, experts=13, devices=5, slots=3, windows=2)
    copy_EG = pack(problem)
    shaken = _shake(copy_EG, np.random.default_rng(0))
    assert is_placement(problem, shaken)
    assert (shaken != copy_EG).any()
    assert (pack(problem, seed=7) == pack(problem, seed=7)).all()
