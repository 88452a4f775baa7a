"""The plan's record, its arithmetic against row by row, and its validator against broken plans."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from made_up_loads import loads, rows_by_hand

from equipoise.errors import UserError
from equipoise.parallel import LeastLoaded, Plan, Replicas, Segment, Transfer, contiguous_owners
from equipoise.parallel.plan import append_rows, checked, expected_load

# Two ranks, two experts. Expert 0 has rows 0..4 (rank 0: 3, rank 1: 2), expert 1 has rows 0..4 (rank 0: 1, rank 1: 4).
LOAD = np.array([[3, 1], [2, 4]])
PLAN = Plan(
    num_ranks=2,
    segments=[[Segment(0, 0, 4), Segment(1, 4, 5)], [Segment(1, 0, 3)]],
    resident=[[0], [1]],
    transfers=[Transfer(0, 0, 1)],
    dropped=[0, 2],
)


def test_arithmetic_of_a_plan_drawn_by_hand():
    PLAN.check(LOAD)
    assert PLAN.load_R().tolist() == [4, 4]
    assert PLAN.imbalance() == 1.0
    # Segments: expert 0 rows 0-3 (three of rank 0, one of rank 1), row 4 (rank 1); expert 1 rows 0-2 (one and two).
    assert PLAN.rows_RS(LOAD).tolist() == [[3, 0, 1], [1, 1, 2]]
    assert PLAN.traffic_RR(LOAD).tolist() == [[3, 1], [1, 3]]
    assert PLAN.received_R().tolist() == [0, 1]
    # Rank 0 holds one expert, rank 1 holds one and receives one; four rows each.
    assert PLAN.bytes_R(row_bytes=10, expert_bytes=100).tolist() == [140, 240]


def test_a_segment_is_a_plain_triple_in_a_plain_list():
    assert PLAN.segments[0] == [(0, 0, 4), (1, 4, 5)]
    assert PLAN.transfers == [(0, 0, 1)]


BROKEN = {
    "a row is computed twice": (
        replace(PLAN, segments=[[Segment(0, 0, 4), Segment(1, 3, 5)], PLAN.segments[1]]),
        "over",
    ),
    "a row is lost": (replace(PLAN, segments=[[Segment(0, 0, 4)], PLAN.segments[1]]), "1 rows are in no segment"),
    "a hole": (replace(PLAN, segments=[[Segment(0, 1, 5)], PLAN.segments[1]]), "1 rows are in no segment"),
    "a row too many": (replace(PLAN, segments=[[Segment(0, 0, 6)], PLAN.segments[1]]), "leaves the rows"),
    "an empty segment": (replace(PLAN, segments=[[Segment(0, 0, 5), Segment(1, 5, 5)], PLAN.segments[1]]), "leaves"),
    "drops are not counted": (replace(PLAN, dropped=[0, 1]), "2 rows are in no segment, but 1"),
    "more drops are counted": (replace(PLAN, dropped=[1, 2]), "0 rows are in no segment, but 1"),
    "no such rank": (replace(PLAN, segments=[[Segment(2, 0, 5)], PLAN.segments[1]]), "does not exist"),
    "weights are missing": (replace(PLAN, transfers=[]), r"Ranks \[1\] compute expert 0 without"),
    "sent twice": (replace(PLAN, transfers=[*PLAN.transfers, *PLAN.transfers]), "has it already"),
    "sent home": (replace(PLAN, transfers=[*PLAN.transfers, Transfer(1, 1, 1)]), "has it already"),
    "sent by a stranger": (replace(PLAN, transfers=[Transfer(0, 1, 1)]), "source does not hold"),
    "sent on by a receiver": (replace(PLAN, transfers=[*PLAN.transfers, Transfer(0, 1, 0)]), "source does not hold"),
    "sent outside": (replace(PLAN, transfers=[*PLAN.transfers, Transfer(0, 0, 2)]), "no such rank"),
    "no such expert": (replace(PLAN, transfers=[*PLAN.transfers, Transfer(2, 0, 1)]), "no such expert"),
    "held by nobody": (replace(PLAN, resident=[[0], []]), "must be resident"),
    "held twice by one rank": (replace(PLAN, resident=[[0, 0], [1]]), "once per rank"),
    "held outside": (replace(PLAN, resident=[[0], [1, 2]]), "outside the ranks"),
    "other ranks": (replace(PLAN, num_ranks=3), r"\[3, 2\]"),
    "other experts": (replace(PLAN, dropped=[0]), "once for every expert"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_validator_finds(name):
    plan, message = BROKEN[name]
    with pytest.raises(UserError, match=message):
        plan.check(LOAD)


@settings(max_examples=60, deadline=None)
@given(loads(max_ranks=5, max_experts=5))
def test_rows_and_traffic_agree_with_every_row_looked_up(case):
    load_RE, owner_E, _ = case
    load_RE = load_RE % 23
    for planner in (LeastLoaded(min_rows=3, threshold=0.0, max_rows=17), Replicas(num_slots=7 * load_RE.shape[0])):
        plan = planner.plan(load_RE, owner_E)
        by_hand = rows_by_hand(plan, load_RE)
        assert (plan.traffic_RR(load_RE) == by_hand.sum(2)).all()
        assert (plan.load_R() == by_hand.sum((0, 2))).all()
        assert plan.rows_RS(load_RE).sum() == by_hand.sum() == load_RE.sum() - sum(plan.dropped)


def test_a_step_without_rows_is_balanced():
    nothing = Plan(2, [[]], [[0]], [], [0])
    nothing.check(np.array([[0], [0]]))
    assert nothing.imbalance() == 1.0
    assert nothing.rows_RS(np.array([[0], [0]])).shape == (2, 0)
    assert nothing.traffic_RR(np.array([[0], [0]])).tolist() == [[0, 0], [0, 0]]


def test_contiguous_owners_are_equal_blocks_or_differ_by_one():
    assert contiguous_owners(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert contiguous_owners(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert contiguous_owners(2, 3).tolist() == [0, 1]
    for num_experts, num_ranks in ((61, 7), (5, 5), (256, 64), (3, 11)):
        counts = np.bincount(contiguous_owners(num_experts, num_ranks), minlength=num_ranks)
        assert counts.max() - counts.min() <= 1
    with pytest.raises(UserError, match="at least 1"):
        contiguous_owners(0, 3)


@pytest.mark.parametrize(
    ("load_RE", "owner_E", "message"),
    [
        (np.array([1, 2]), np.array([0, 0]), r"must be \[ranks, experts\]"),
        (np.zeros((0, 2), dtype=int), np.array([0, 0]), r"must be \[ranks, experts\]"),
        (LOAD, np.array([0]), "2 owners"),
        (LOAD, np.array([0, 2]), "between 0 and 1"),
        (LOAD, np.array([-1, 0]), "between 0 and 1"),
        (-LOAD, np.array([0, 1]), "negative"),
        (LOAD / 2, np.array([0, 1]), "integers"),
    ],
)
def test_input_that_does_not_fit_is_refused(load_RE, owner_E, message):
    with pytest.raises(UserError, match=message):
        checked(load_RE, owner_E)


def test_the_expected_load_is_that_of_the_window():
    history_WE = np.array([[9, 9], [1, 2], [3, 4]])
    assert expected_load(LOAD, history_WE, 2).tolist() == [4, 6]
    assert expected_load(LOAD, None, 2).tolist() == [5, 5]
    assert expected_load(LOAD, history_WE[:0], 2).tolist() == [0, 0]
    with pytest.raises(UserError, match=r"\[iterations, 2\]"):
        expected_load(LOAD, history_WE[:, :1], 2)
    with pytest.raises(UserError, match="window"):
        expected_load(LOAD, history_WE, 0)


def test_neighbouring_rows_of_one_rank_make_one_segment():
    segments = []
    for rank, start, rows in ((1, 0, 2), (1, 2, 3), (0, 5, 0), (0, 5, 1), (1, 6, 1)):
        append_rows(segments, rank, start, rows)
    assert segments == [(1, 0, 5), (0, 5, 6), (1, 6, 7)]
