"""Least-loaded planning against its pseudocode, and the bounds that it must keep."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from made_up_loads import loads, skewed

from equipoise.errors import UserError
from equipoise.parallel import LeastLoaded, Native, break_even_rows, contiguous_owners


def pseudocode(load_E, owner_E, num_ranks, capacity, min_rows):
    """The paper's algorithm as written, ranks sorted anew after each chunk: segments per expert."""
    pending = [sum(load for load, owner in zip(load_E, owner_E) if owner == rank) for rank in range(num_ranks)]
    assigned = [0] * num_ranks
    segments = [[] for _ in load_E]
    for expert in sorted(range(len(load_E)), key=lambda expert: (-load_E[expert], expert)):
        home, rows = owner_E[expert], load_E[expert]
        pending[home] -= rows
        take = max(0, min(capacity - assigned[home] - pending[home], rows))
        found = [(home, take)] if take else []
        assigned[home] += take
        left = rows - take
        while left:
            others = [rank for rank in range(num_ranks) if rank != home]
            others.sort(key=lambda rank: (assigned[rank] + pending[rank], rank))
            for rank in others:
                chunk = min(left, capacity - assigned[rank] - pending[rank])
                if chunk > 0 and (chunk >= min_rows or chunk >= left):
                    break
            else:
                rank, chunk = (others or [home])[0], left
            found.append((rank, chunk))
            assigned[rank] += chunk
            left -= chunk
        position = 0
        for rank, chunk in found:
            segments[expert].append((rank, position, position + chunk))
            position += chunk
    return segments


@settings(max_examples=200, deadline=None)
@given(loads(), st.sampled_from([1, 3, 17]), st.sampled_from(["1.0", "1.1", "1.5"]))
def test_segments_are_those_of_the_pseudocode(case, min_rows, alpha):
    load_RE, owner_E, _ = case
    num_ranks, total = load_RE.shape[0], int(load_RE.sum())
    capacity = -(-total * int(alpha.replace(".", "")) // (10 * num_ranks))
    plan = LeastLoaded(alpha=float(alpha), min_rows=min_rows, threshold=0.0).plan(load_RE, owner_E)
    expected = pseudocode(load_RE.sum(0).tolist(), owner_E.tolist(), num_ranks, capacity, min_rows)
    assert [_merged(segments) for segments in expected] == plan.segments


def _merged(segments):
    merged = []
    for rank, start, end in segments:
        if merged and merged[-1][0] == rank:
            start = merged.pop()[1]
        merged.append((rank, start, end))
    return merged


@settings(max_examples=200, deadline=None)
@given(loads(), st.sampled_from([1.0, 1.25, 2.0]))
def test_with_chunks_of_any_size_no_rank_exceeds_the_capacity(case, alpha):
    load_RE, owner_E, _ = case
    num_ranks = load_RE.shape[0]
    plan = LeastLoaded(alpha=alpha, min_rows=1, threshold=0.0).plan(load_RE, owner_E)
    assert plan.load_R().max() <= math.ceil(alpha * load_RE.sum() / num_ranks)
    spilled = {transfer.expert for transfer in plan.transfers}
    assert len(plan.transfers) <= len(spilled) + num_ranks - 1


@settings(max_examples=200, deadline=None)
@given(loads(), st.sampled_from([2, 13, 101]), st.sampled_from(["helper", "native"]))
def test_the_busiest_rank_stays_below_the_bound(case, min_rows, overflow):
    load_RE, owner_E, _ = case
    num_ranks = load_RE.shape[0]
    plan = LeastLoaded(min_rows=min_rows, threshold=0.0, overflow=overflow).plan(load_RE, owner_E)
    own = np.bincount(owner_E, minlength=num_ranks) if overflow == "native" else 0  # each may keep a crumb at home
    bound = math.ceil(load_RE.sum() / num_ranks) + (num_ranks - 1 + own) * (min_rows - 1)
    assert (plan.load_R() <= bound).all()


@settings(max_examples=200, deadline=None)
@given(loads(), st.sampled_from([2, 13, 101]))
def test_overflow_that_is_spread_exceeds_the_capacity_by_less_than_a_chunk(case, min_rows):
    load_RE, owner_E, _ = case
    plan = LeastLoaded(min_rows=min_rows, threshold=0.0, overflow="spread").plan(load_RE, owner_E)
    assert plan.load_R().max() <= math.ceil(load_RE.sum() / load_RE.shape[0]) + min_rows - 1


@settings(max_examples=200, deadline=None)
@given(loads(), st.integers(2, 29))
def test_with_slack_enough_nothing_is_forced(case, min_rows):
    load_RE, owner_E, _ = case
    num_ranks, total = load_RE.shape[0], int(load_RE.sum())
    assume(total >= (num_ranks - 1) * (min_rows - 1))  # alpha = 2: a slack of one whole total
    plan = LeastLoaded(alpha=2.0, min_rows=min_rows, threshold=0.0).plan(load_RE, owner_E)
    assert plan.load_R().max() <= math.ceil(2 * total / num_ranks)


@settings(max_examples=200, deadline=None)
@given(loads())
def test_where_every_owner_has_room_the_plan_is_the_native_one(case):
    load_RE, owner_E, _ = case
    native = Native().plan(load_RE, owner_E)
    alpha = max(1.0, native.imbalance() + 1e-9)
    assert LeastLoaded(alpha=alpha, threshold=0.0, min_rows=1).plan(load_RE, owner_E) == native


def test_the_threshold_is_held_against_ranks_and_is_not_reached_when_equal():
    # Experts 9, 1, 5, 5: the loads of experts are uneven (1.8), those of ranks are not.
    load_RE = np.array([[9, 1, 5, 5], [0, 0, 0, 0]])
    owner_E = np.array([0, 0, 1, 1])
    assert LeastLoaded(min_rows=1, threshold=1.01).plan(load_RE, owner_E).transfers == []
    # Ranks 13 and 7: the ratio is 1.3 exactly, in decimals, which no binary fraction is.
    load_RE = np.array([[12, 1, 2, 5], [0, 0, 0, 0]])
    assert len(LeastLoaded(min_rows=1, threshold=1.3).plan(load_RE, owner_E).transfers) == 1
    assert LeastLoaded(min_rows=1, threshold=1.31).plan(load_RE, owner_E).transfers == []


def test_an_example_worked_by_hand():
    # Four ranks with an expert each; 100 of 160 rows go to expert 2, so the capacity is 40.
    load_RE = np.array([[5, 0, 25, 0], [5, 10, 25, 5], [5, 5, 25, 5], [5, 5, 25, 10]])
    plan = LeastLoaded(min_rows=1).plan(load_RE, np.arange(4))
    # Rank 2 keeps 40. Ranks 0, 1 and 3 have 20 each and take 20 each, lowest id first.
    assert plan.segments[2] == [(2, 0, 40), (0, 40, 60), (1, 60, 80), (3, 80, 100)]
    assert plan.transfers == [(2, 2, 0), (2, 2, 1), (2, 2, 3)]
    assert plan.load_R().tolist() == [40, 40, 40, 40]


def test_overflow_goes_to_a_helper_or_stays_at_home():
    load_RE = np.array([[0, 9, 9], [0, 0, 9], [30, 0, 0]])  # 57 rows, capacity 19: rooms of 10 and 1 for 11 rows
    helper = LeastLoaded(min_rows=11).plan(load_RE, np.arange(3))
    native = LeastLoaded(min_rows=11, overflow="native").plan(load_RE, np.arange(3))
    assert helper.segments[0] == [(0, 0, 19), (1, 19, 30)]
    assert native.segments[0] == [(0, 0, 30)]
    # A last chunk that is small: the code sends it, the paper's text keeps it.
    load_RE = np.array([[0, 9, 9], [0, 0, 0], [21, 0, 0]])  # capacity 13, 8 rows spill
    assert LeastLoaded(min_rows=9).plan(load_RE, np.arange(3)).segments[0] == [(0, 0, 13), (1, 13, 21)]
    assert LeastLoaded(min_rows=9, overflow="native").plan(load_RE, np.arange(3)).transfers == []


def test_a_chunk_leaves_the_node_only_when_it_is_large_enough():
    # Nodes {0, 1} and {2, 3}; capacity 25; rank 1 has room for 10 of the 47 rows that spill, 2 and 3 for 20 and 17.
    load_RE = np.zeros((4, 4), dtype=int)
    load_RE[0] = [72, 15, 5, 8]
    near = LeastLoaded(min_rows=(1, 18), ranks_per_node=2).plan(load_RE, np.arange(4))
    assert near.segments[0][:3] == [(0, 0, 25), (2, 25, 45), (1, 45, 55)]
    assert near.segments[0][3].rank == 2 or near.segments[0][3].rank == 3  # forced: nobody has room for a chunk of 18
    far = LeastLoaded(min_rows=(1, 17), ranks_per_node=2).plan(load_RE, np.arange(4))
    assert far.segments[0] == [(0, 0, 25), (2, 25, 45), (3, 45, 62), (1, 62, 72)]


@settings(max_examples=200, deadline=None)
@given(loads(), st.integers(0, 300), st.sampled_from(["helper", "native", "spread"]))
def test_max_rows_is_kept_and_drops_only_what_all_ranks_cannot_hold(case, max_rows, overflow):
    load_RE, owner_E, _ = case
    plan = LeastLoaded(min_rows=50, max_rows=max_rows, overflow=overflow).plan(load_RE, owner_E)
    plan.check(load_RE)
    assert plan.load_R().max() <= max_rows
    assert sum(plan.dropped) == max(0, load_RE.sum() - max_rows * load_RE.shape[0])


@settings(max_examples=200, deadline=None)
@given(loads(), st.integers(0, 3))
def test_max_foreign_is_kept_and_alone_drops_nothing(case, max_foreign):
    load_RE, owner_E, _ = case
    plan = LeastLoaded(min_rows=1, threshold=0.0, max_foreign=max_foreign).plan(load_RE, owner_E)
    plan.check(load_RE)
    assert plan.received_R().max() <= max_foreign
    assert sum(plan.dropped) == 0


def test_a_helper_that_has_the_expert_takes_more_of_it_without_more_memory():
    # Capacity 7. Expert 1: 7 on rank 0, 4 on rank 1, which then is full of foreign experts. Expert 0: 7 on rank 2; of
    # the other 3, in chunks of 2, the first makes rank 0 full of foreign experts, and the last one may join it.
    load_RE = np.array([[10, 11], [0, 0], [0, 0]])
    plan = LeastLoaded(min_rows=2, max_foreign=1, overflow="spread").plan(load_RE, np.array([2, 0]))
    assert plan.segments == [[(2, 0, 7), (0, 7, 10)], [(0, 0, 7), (1, 7, 11)]]
    assert plan.transfers == [(0, 2, 0), (1, 0, 1)]


def test_all_tokens_to_one_expert_of_a_large_group():
    load_RE = np.zeros((320, 320), dtype=int)
    load_RE[:, 7] = 1000
    plan = LeastLoaded().plan(load_RE, contiguous_owners(320, 320))
    plan.check(load_RE)
    # The capacity of 1,000 rows is less than a chunk: the published rule forces all on one helper.
    assert plan.load_R().max() == 319_000
    assert LeastLoaded(overflow="spread").plan(load_RE, contiguous_owners(320, 320)).imbalance() == 1.024
    assert LeastLoaded(min_rows=1).plan(load_RE, contiguous_owners(320, 320)).imbalance() == 1.0


def test_large_groups_are_balanced():
    load_RE = skewed(num_ranks=64, num_experts=256, rows=32768)
    owner_E = contiguous_owners(256, 64)
    assert Native().plan(load_RE, owner_E).imbalance() > 3
    plan = LeastLoaded().plan(load_RE, owner_E)
    plan.check(load_RE)
    assert plan.imbalance() < 1.05


def test_break_even_is_that_of_the_published_machines():
    assert break_even_rows(7e14, 4e11, training=False) == 1750
    assert break_even_rows(7e14, 5e10, training=False) == 14000
    assert break_even_rows(6e14, 4e11) == 1000
    with pytest.raises(UserError, match="positive"):
        break_even_rows(0.0, 1.0)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"alpha": 0.9}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"threshold": -1.0}, "threshold"),
        ({"min_rows": 0}, "min_rows"),
        ({"min_rows": (1, 0), "ranks_per_node": 2}, "min_rows"),
        ({"min_rows": (1, 2)}, "needs ranks_per_node"),
        ({"min_rows": (2, 1), "ranks_per_node": 2}, "must not be less"),
        ({"ranks_per_node": 0}, "ranks_per_node"),
        ({"max_rows": -1}, "max_rows"),
        ({"max_foreign": -1}, "max_foreign"),
    ],
)
def test_settings_without_sense_are_refused(settings_, message):
    with pytest.raises(UserError, match=message):
        LeastLoaded(**settings_)
