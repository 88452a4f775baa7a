import numpy as np
import pytest

from equipoise.errors import UserError
from equipoise.placement import Placement, contiguous

ORDER = np.array([[0, 1, 2, 0], [2, 1, 0, 2]])


def given(order=ORDER, **others) -> Placement:
    return Placement(**({"physical_to_logical": np.array(order), "num_experts": 3, "devices": 2} | others))


def test_loads_of_devices_by_hand():
    placement = given()
    load_WLE = np.array([[[6, 2, 4], [1, 1, 10]], [[0, 0, 0], [0, 0, 8]]])
    # Layer 0: expert 0 has two copies; device 0 holds 0, 1 and device 1 holds 2, 0.
    expected = [[[3 + 2, 4 + 3], [5 + 1, 1 + 5]], [[0, 0], [4, 4]]]
    np.testing.assert_allclose(placement.device_loads(load_WLE), expected)
    np.testing.assert_allclose(placement.fullest(load_WLE), [[7 / 6, 1.0], [1.0, 1.0]])


def test_who_holds_what():
    placement = given()
    np.testing.assert_array_equal(placement.copies_LE, [[2, 1, 1], [1, 1, 2]])
    np.testing.assert_array_equal(placement.copy_LEG[0], [[True, True], [True, False], [False, True]])


def test_figures_follow_from_the_layers():
    placement = given(balance_L=np.array([1.2, 1.4]), bound_L=np.array([1.0, 1.25]), moved=3, expert_bytes=10)
    assert placement.balance == pytest.approx(1.3)
    assert placement.gap == pytest.approx(1.3 / 1.125 - 1)
    assert placement.moved_bytes == 30
    assert given().gap is None
    assert given().moved_bytes is None


def test_experts_in_order_go_round():
    assert contiguous(1, 3, 2, 2).physical_to_logical.tolist() == [[0, 1, 2, 0]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"order": [[0, 1, 1, 0], [2, 1, 0, 2]]}, "Layer 0 of the placement has no slot for expert 2"),
        ({"order": [[0, 1, 2, 0], [1, 1, 0, 1]]}, "Layer 1 of the placement has no slot for expert 2"),
        ({"order": [[0, 1, 2, 3]]}, "from 0 to 2, not 0 to 3"),
        ({"order": [[0, 1, 2, -1]]}, "from 0 to 2, not -1 to 2"),
        ({"devices": 3}, "4 slots do not divide over 3 devices"),
        ({"nodes": 3}, "2 devices do not divide over 3 nodes"),
        ({"devices": 0}, "needs"),
    ],
)
def test_what_cannot_be_a_placement_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        given(**changes)
