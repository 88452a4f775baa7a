"""Hecate's planner: its limits, its order of preference, and examples worked by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_loads import loads, rows_by_hand, skewed

from equipoise.errors import UserError
from equipoise.parallel import Calibration, Native, ShardedSparse, contiguous_owners, overlap_degree
from equipoise.parallel.sharded_sparse import _share_slots, materialise


@settings(max_examples=150, deadline=None)
@given(loads(), st.integers(0, 15), st.integers(0, 6))
def test_no_rank_gets_more_experts_than_slots_and_only_the_heaviest_travel(case, overlap, slots):
    load_RE, owner_E, ranks_per_node = case
    plan = ShardedSparse(overlap=overlap, slots=slots, ranks_per_node=ranks_per_node).plan(load_RE, owner_E)
    assert plan.received_R().max() <= min(slots, overlap)
    lightest = np.sort(load_RE.sum(0))[::-1][: max(overlap, 1)].min()
    assert all(load_RE[:, transfer.expert].sum() >= lightest for transfer in plan.transfers)


@settings(max_examples=60, deadline=None)
@given(loads(max_ranks=5, max_experts=5))
def test_a_row_leaves_its_rank_or_node_only_where_no_replica_is(case):
    load_RE, owner_E, ranks_per_node = case
    load_RE = load_RE % 29
    plan = ShardedSparse(overlap=3, slots=1, ranks_per_node=ranks_per_node).plan(load_RE, owner_E)
    holders = [{owner} for owner in owner_E.tolist()]
    for expert, _, destination in plan.transfers:
        holders[expert].add(destination)
    for source, rank, expert in np.argwhere(rows_by_hand(plan, load_RE)).tolist():
        near = {holder for holder in holders[expert] if holder // ranks_per_node == source // ranks_per_node}
        assert rank in ({source} & holders[expert] or near or holders[expert])


@settings(max_examples=60, deadline=None)
@given(loads())
def test_without_overlap_it_is_plain_expert_parallelism_and_with_all_of_it_no_row_travels(case):
    load_RE, owner_E, _ = case
    assert ShardedSparse(overlap=0, slots=3).plan(load_RE, owner_E) == Native().plan(load_RE, owner_E)
    num_experts = load_RE.shape[1]
    everywhere = ShardedSparse(overlap=num_experts, slots=num_experts).plan(load_RE, owner_E)
    assert (everywhere.traffic_RR(load_RE) == np.diag(load_RE.sum(1))).all()


def test_largest_remainders_with_a_limit():
    # 6 slots for 50, 30, 20: 3.0, 1.8, 1.2.
    assert _share_slots([50, 30, 20], [9, 9, 9], 6) == [3, 2, 1]
    # The first may have 2: its third slot goes to the next remainder.
    assert _share_slots([50, 30, 20], [2, 9, 9], 6) == [2, 2, 2]
    assert _share_slots([50, 30, 0], [1, 1, 9], 6) == [1, 1, 0]
    assert _share_slots([7, 7], [9, 9], 3) == [2, 1]


def test_replicas_spread_over_nodes_that_have_none_yet():
    # Nodes {0, 1} and {2, 3}, a slot per rank, top 2 of three experts: loads 30 and 10 share 4 slots as 3 and 1.
    load_E = np.array([30, 10, 5])
    holders = materialise(load_E, [[0], [3], [1]], 2, np.ones(4, dtype=np.int64), 2)
    # Expert 0 (on rank 0): first node 1, rank 2; then both nodes have it, node 0 has two free slots: rank 1; then the
    # other node: rank 3. Expert 1 (on rank 3) finds only rank 0 free.
    assert holders == [[0, 1, 2, 3], [0, 3], [1]]


def test_a_node_without_the_expert_goes_before_a_roomier_one():
    # Rank 1 has two free slots, rank 2 one; expert 0 is on rank 0, the others on rank 3; one replica for each.
    holders = materialise(np.array([10, 10, 10]), [[0], [3], [3]], 3, np.array([0, 2, 1, 0]), 2)
    assert holders == [[0, 2], [1, 3], [1, 3]]


def test_few_experts_go_everywhere():
    load_E = np.array([1, 9, 3])
    holders = materialise(load_E, [[0], [1], [2]], 2, np.full(3, 2), 8)
    assert holders == [[0], [0, 1, 2], [0, 1, 2]]


def test_the_prediction_is_the_mean_of_the_window():
    load_RE = np.array([[10, 0], [10, 0]])
    history_WE = np.array([[99, 0], [0, 3], [0, 3]])
    planner = ShardedSparse(overlap=1, slots=1, window=2)
    assert {transfer.expert for transfer in planner.plan(load_RE, np.array([0, 0]), history_WE).transfers} == {1}
    assert {transfer.expert for transfer in planner.plan(load_RE, np.array([0, 0])).transfers} == {0}
    nothing_seen = np.zeros((0, 2), dtype=np.int64)
    blind = ShardedSparse(overlap=1, slots=1).plan(load_RE, np.array([1, 0]), nothing_seen)
    assert blind.segments == Native().plan(load_RE, np.array([1, 0])).segments


@pytest.mark.parametrize(("expert_seconds", "accepted"), [(9.9, True), (10.1, False)])
def test_calibration_is_accepted_when_it_pays(expert_seconds, accepted):
    # History knows expert 1 only; the true load is all on expert 0 of rank 0: 20 rows there, 10 when it is replicated.
    load_RE, history_WE = np.array([[10, 0], [10, 0]]), np.array([[0, 5]])
    calibration = Calibration(slots=1, row_seconds=1.0, expert_seconds=expert_seconds)
    planner = ShardedSparse(overlap=1, slots=1, calibration=calibration)
    plan = planner.plan(load_RE, np.array([0, 0]), history_WE)
    plan.check(load_RE)
    assert plan.load_R().tolist() == ([10, 10] if accepted else [20, 0])
    assert plan.received_R().tolist() == ([0, 2] if accepted else [0, 1])


def test_rematerialising_is_passed_on_to_whoever_executes_the_plan():
    load_RE = skewed(3, 5)
    plan = ShardedSparse(overlap=2, slots=1, rematerialise=True).plan(load_RE, contiguous_owners(5, 3))
    assert plan.rematerialise
    assert not ShardedSparse(overlap=2, slots=1).plan(load_RE, contiguous_owners(5, 3)).rematerialise


def test_overlap_degree_and_settings_without_sense():
    assert overlap_degree(other_seconds=0.5, bandwidth=100.0, expert_bytes=20) == 2
    with pytest.raises(UserError, match="positive"):
        overlap_degree(0.0, 1.0, 1)
    for wrong in ({"overlap": -1, "slots": 1}, {"overlap": 1, "slots": 1, "ranks_per_node": 0}):
        with pytest.raises(UserError, match="must"):
            ShardedSparse(**wrong).plan(np.array([[1]]), np.array([0]))
