"""Rows shared out among replicas: even, near, and never biased by more than a row."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.parallel.sharing import evenly, nearest


def test_even_shares_by_hand():
    assert evenly(10, [2, 0, 3]) == [(2, 0, 3), (0, 3, 6), (3, 6, 10)]
    assert evenly(10, [1, 1, 4]) == [(1, 0, 6), (4, 6, 10)]  # two replicas on rank 1
    assert evenly(0, [1, 2]) == []
    assert evenly(1, [1, 2]) == [(2, 0, 1)]


def test_near_shares_by_hand():
    # Nodes {0, 1}, {2, 3} and {4, 5}; the expert is on ranks 1, 2 and 3.
    segments = nearest([3, 4, 1, 0, 5, 2], [1, 2, 3], ranks_per_node=2)
    # Rank 0 goes to 1, its node's only one; 1 and 2 keep theirs; ranks 4 and 5 have none near and use all three:
    # 5 = 2 + 2 + 1, then 2 more for those whose turn it is: 3, then 1.
    assert segments == [(1, 0, 7), (2, 7, 8), (1, 8, 10), (2, 10, 12), (3, 12, 13), (1, 13, 14), (3, 14, 15)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.data(), st.integers(1, 4))
def test_rows_stay_as_near_as_they_can_and_are_shared_evenly(rows, data, ranks_per_node):
    ranks = range(len(rows))
    holders = sorted(data.draw(st.sets(st.sampled_from(ranks), min_size=1)))
    computed = [rank for rank, start, end in nearest(rows, holders, ranks_per_node) for _ in range(start, end)]
    assert len(computed) == sum(rows)
    position, by_choice = 0, {}
    for source in ranks:
        mine = computed[position : position + rows[source]]
        position += rows[source]
        near = [rank for rank in holders if rank // ranks_per_node == source // ranks_per_node]
        choice = tuple([source] if source in holders else near or holders)
        if len(holders) > 1:
            _assert_even(Counter(mine), choice)
        by_choice.setdefault(choice, Counter()).update(mine)
    for choice, count in by_choice.items():
        _assert_even(count, choice)


def _assert_even(count, choice):
    assert count.keys() <= set(choice)
    shares = [count[rank] for rank in choice]
    assert max(shares) - min(shares) <= 1
