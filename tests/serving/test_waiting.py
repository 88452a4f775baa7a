from hypothesis import given
from hypothesis import strategies as st
from made_up_requests import request

from equipoise.serving.waiting import Queue, Waiting


def waiting(id, since, missing, blocks=5, other="b"):
    return Waiting(request(id, tuple(range(100 * id, 100 * id + blocks))), since, "a", other, missing)


def test_the_longest_cached_prefix_goes_first_then_the_earliest():
    queue = Queue()
    for item in (waiting(1, 0.0, 2560), waiting(2, 1.0, 512), waiting(3, 0.5, 512), waiting(4, 2.0, 1)):
        queue.add(item)
    order = []
    while len(queue):
        order.append(queue.next(overdue_since=-1.0))
        queue.remove(order[-1])
    assert [item.request.id for item in order] == [4, 3, 2, 1]
    assert queue.tokens == 0


def test_whoever_waited_too_long_goes_before_any_prefix():
    queue = Queue()
    queue.add(waiting(1, 0.5, 2560))
    queue.add(waiting(2, 1.0, 1))
    assert queue.next(overdue_since=0.4).request.id == 2
    assert queue.next(overdue_since=0.5).request.id == 1


def test_tokens_ahead_are_those_of_better_ranks_only():
    queue = Queue()
    first, second, third = waiting(1, 0.0, 1), waiting(2, 0.0, 512), waiting(3, 0.0, 2560)
    for item in (third, first, second):
        queue.add(item)
    ahead = queue.tokens_ahead()
    assert [ahead.of(item.rank) for item in (first, second, third)] == [0, 1, 513]
    assert ahead.of((-10_000, 0.0, 9)) == 0
    assert ahead.of((0, 9.0, 9)) == 1 + 512 + 2560


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(1, 2560), st.sampled_from("bc")), max_size=30), st.randoms())
def test_any_order_of_removals_keeps_sums_ages_and_partners(items, random):
    queue = Queue()
    members = [waiting(id, since, missing, other=other) for id, (since, missing, other) in enumerate(items)]
    for item in members:
        queue.add(item)
    random.shuffle(members)
    while members:
        queue.remove(members.pop())
        assert (len(queue), queue.tokens) == (len(members), sum(item.missing for item in members))
        assert queue.oldest() == min((item.since for item in members), default=float("inf"))
        assert set(queue.others()) == {item.other for item in members}
        ids = [item.request.id for other in "bc" for item in queue.with_other(other)]
        assert sorted(ids) == sorted(item.request.id for item in members)
