"""EPLB: its published example to the slot, its invariants, and the plans made of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_loads import skewed

from equipoise.errors import UserError
from equipoise.parallel import Replicas, contiguous_owners, rebalance_experts
from equipoise.parallel.eplb import pack

# The example of EPLB's README: 12 experts in 4 groups, 16 replicas on 2 nodes with 4 devices each.
README_LE = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)
README_SLOTS = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
# What its code at d52c72d answers for the same loads with the global policy.
GLOBAL_SLOTS = [
    [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1],
    [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7],
]


def device_imbalance(maps, load_LE, num_devices):
    share_LP = np.take_along_axis(load_LE / maps.replicas, maps.physical_to_logical, 1)
    load_LD = share_LP.reshape(len(load_LE), num_devices, -1).sum(2)
    return (load_LD.max(1) / load_LD.mean(1)).round(3).tolist()


def test_the_published_example():
    maps = rebalance_experts(README_LE, 16, num_groups=4, num_nodes=2, num_devices=8)
    assert maps.physical_to_logical.tolist() == README_SLOTS
    assert device_imbalance(maps, README_LE, 8) == [1.208, 1.242]
    # Layer 0 replicates experts 1, 4, 5 and 10.
    assert maps.replicas[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert maps.logical_to_physical[0, [0, 1, 5]].tolist() == [[12, -1], [15, 13], [0, 2]]


@pytest.mark.parametrize(("num_groups", "num_nodes"), [(1, 1), (3, 2)])
def test_the_published_example_with_the_global_policy(num_groups, num_nodes):
    maps = rebalance_experts(README_LE, 16, num_groups, num_nodes, num_devices=8)
    assert maps.physical_to_logical.tolist() == GLOBAL_SLOTS
    assert device_imbalance(maps, README_LE, 8) == [1.073, 1.19]


@settings(max_examples=70, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2), st.integers(1, 99)
)
def test_every_replica_has_one_slot_and_every_slot_one_replica(nodes, groups, devices, size, extra, seed):
    num_experts, num_devices = nodes * groups * size, nodes * devices
    num_slots = (-(-num_experts // num_devices) + extra) * num_devices
    load_LE = skewed(2, num_experts, rows=1009, seed=seed)
    maps = rebalance_experts(load_LE, num_slots, nodes * groups, nodes, num_devices)
    for layer in range(2):
        counts = np.bincount(maps.physical_to_logical[layer], minlength=num_experts)
        assert counts.tolist() == maps.replicas[layer].tolist()
        assert counts.min() >= 1
        for expert in range(num_experts):
            slots = maps.logical_to_physical[layer, expert]
            assert sorted(slots[slots >= 0]) == np.flatnonzero(maps.physical_to_logical[layer] == expert).tolist()
        node_S = np.arange(num_slots) // (num_slots // nodes)
        group_S = maps.physical_to_logical[layer] // size
        assert len({*zip(node_S.tolist(), group_S.tolist())}) == nodes * groups  # a group is on one node


def test_packing_by_hand():
    # 9, 7, 4, 4, 3, 1 into three bins of two: 9 | 7 | 4, then 4 joins the 4, 3 the 7, and 1 the 9.
    bin_XN, place_XN = pack(np.array([[4, 9, 1, 4, 7, 3]], dtype=np.float32), 3)
    assert bin_XN.tolist() == [[2, 0, 0, 2, 1, 1]]
    assert place_XN.tolist() == [[0, 0, 1, 1, 0, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((15, 4, 2, 8), "15 slots do not divide over 8 devices"),
        ((8, 4, 2, 8), "8 slots cannot hold 12"),
        ((16, 5, 1, 8), "12 experts do not divide into 5"),
        ((16, 3, 3, 8), "8 devices do not divide over 3 nodes"),
        ((16, 0, 1, 8), "at least 1"),
    ],
)
def test_counts_that_do_not_divide_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        rebalance_experts(README_LE, *arguments)
    with pytest.raises(UserError, match="finite"):
        rebalance_experts(-README_LE, 16, 4, 2, 8)


def test_a_plan_gives_every_device_the_load_that_the_placement_promises():
    load_RE = np.tile(README_LE[0], (8, 1))
    planner = Replicas(num_slots=16, num_groups=4, num_nodes=2)
    plan = planner.plan(load_RE, contiguous_owners(12, 8))
    plan.check(load_RE)
    assert round(plan.imbalance(), 3) == 1.208
    assert plan.transfers == []
    assert plan.resident[5] == [0, 1]  # slots 0 and 2, two slots per device
    assert plan.segments[5] == [(0, 0, 660), (1, 660, 1320)]


def test_two_replicas_on_one_rank_take_two_shares():
    load_RE = np.array([[90, 5, 5], [0, 1, 0]])
    planner = Replicas(num_slots=6)
    assert planner.holders(load_RE.sum(0), 2)[0] == [0, 0, 1, 1]
    plan = planner.plan(load_RE, np.array([0, 1, 1]))
    assert plan.resident[0] == [0, 1]
    assert plan.segments[0] == [(0, 0, 45), (1, 45, 90)]


def test_the_placement_comes_from_the_history_and_the_rows_from_the_load():
    load_RE, history_WE = np.array([[90, 6], [0, 0]]), np.array([[999, 0], [0, 50], [0, 50]])
    plan = Replicas(num_slots=4, window=2).plan(load_RE, np.array([0, 1]), history_WE)
    plan.check(load_RE)
    assert len(plan.resident[1]) == 2 > len(plan.resident[0])


def test_nearest_keeps_rows_at_home_and_sent_replicas_come_from_the_owner():
    load_RE = np.array([[8, 1, 0, 1], [8, 0, 1, 0]])
    owner_E = np.array([1, 0, 1, 0])
    nearest = Replicas(num_slots=6, nearest=True).plan(load_RE, owner_E)
    assert nearest.segments[0] == [(0, 0, 8), (1, 8, 16)]
    sent = Replicas(num_slots=6, resident=False).plan(load_RE, owner_E)
    sent.check(load_RE)
    assert sent.segments == Replicas(num_slots=6).plan(load_RE, owner_E).segments
    assert sent.resident == [[1], [0], [1], [0]]
    assert (0, 1, 0) in sent.transfers


def test_more_nodes_than_ranks_are_refused():
    with pytest.raises(UserError, match="do not divide"):
        Replicas(num_slots=6, num_nodes=2, num_groups=2).plan(
            np.ones((3, 4), dtype=np.int64), np.zeros(4, dtype=np.int64)
        )
    with pytest.raises(UserError, match="do not divide"):
        Replicas(num_slots=8, num_nodes=8).plan(np.ones((4, 4), dtype=np.int64), np.zeros(4, dtype=np.int64))
