from itertools import permutations

import numpy as np
import pytest

from equipoise.placement import moves


def held(order: list[list[int]], experts: int) -> np.ndarray:
    copy_EG = np.zeros((experts, len(order)), bool)
    for device, row in enumerate(order):
        copy_EG[row, device] = True
    return copy_EG


def random_held(draw: np.random.Generator, experts: int, devices: int, slots: int) -> np.ndarray:
    return held([list(draw.choice(experts, slots, replace=False)) for _ in range(devices)], experts)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_as_much_stays_as_any_naming_of_devices_could_keep(nodes, seed):
    draw = np.random.default_rng(seed)
    new, present = (random_held(draw, 7, 4, 3) for _ in range(2))
    renamed = moves.stay(new, present, nodes)
    per_node = 4 // nodes
    allowed = [
        names
        for names in permutations(range(4))
        if all(len({names[g] // per_node for g in range(n * per_node, (n + 1) * per_node)}) == 1 for n in range(nodes))
    ]
    best = max((new[:, list(names)] & present).sum() for names in allowed)
    assert (renamed & present).sum() == best
    assert any((new[:, list(names)] == renamed).all() for names in allowed)


def test_moved_counts_copies_that_a_device_did_not_hold():
    present, new = held([[0, 1], [2, 3]], 4), held([[0, 2], [3, 1]], 4)
    assert moves.moved(new[None], present[None]) == 2
    assert moves.moved(present[None], present[None]) == 0


def test_what_stays_keeps_its_slot():
    new = held([[0, 2, 3], [1, 3, 4]], 5)
    assert moves.slots(new, np.array([4, 3, 0, 1, 4, 2])).tolist() == [2, 3, 0, 1, 4, 3]
    assert moves.slots(new, np.array([3, 3, 1, 1, 1, 1])).tolist() == [3, 0, 2, 1, 3, 4]  # doubled copies keep one slot
    assert moves.slots(new, np.arange(5)).tolist() == [0, 2, 3, 1, 3, 4]  # other slots per device: ascending
