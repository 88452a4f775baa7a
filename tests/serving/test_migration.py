"""Limits are in blocks: a replica is within the SLO up to 100, overloaded above 12."""

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_requests import BLOCK, request, warm

from equipoise.serving import DualMap, DualMapSettings
from equipoise.serving.waiting import Waiting

LIMITS = {"slo": 5.0, "slo_fraction": 0.5, "prefill_seconds": 2.5 / (100 * BLOCK), "rebalance_multiple": 0.1201}
MODES = ["greedy", "batch"]


class Moves(list):
    """Notes every move, and that it gained."""

    def __call__(self, waiting, target, here, there):
        assert there < here, "a request was moved without gaining"
        self.append((waiting.request.id, waiting.home, target, here // BLOCK, there // BLOCK))


def router_with(names, **options):
    moves = Moves()
    return DualMap(names, DualMapSettings(**LIMITS, **options), on_move=moves), moves


def prefix_for(router, pair):
    """A first block whose two replicas are these."""
    return next(block for block in count(10**6) if set(router.pair(request(0, (block,)))) == set(pair))


def fill(router, name, other, requests, ids, now=0.0, length=6):
    """Let so many requests wait for a replica: all share one block, which is cached there."""
    first = prefix_for(router, (name, other))
    warm(router, name, (first,))
    for id in ids[:requests]:
        tail = tuple(range(1000 * id, 1000 * id + length - 1))
        assert router.submit(request(id, (first, *tail)), now) == name
    return first


@pytest.mark.parametrize("mode", MODES)
def test_an_overloaded_replica_is_relieved_at_the_next_tick(mode):
    """Four lack 5 blocks each at a: 20 wait, 8 too many. At b each lacks 6: 20 to 6, and then 15 to 6."""
    router, moves = router_with(["a", "b"], migration=mode)
    fill(router, "a", "b", 4, [1, 2, 3, 4])
    assert moves == []  # b is not overloaded, so nothing happens on arrival
    router.tick(0.1)
    assert moves == [(4, "a", "b", 20, 6), (3, "a", "b", 15, 6)]
    assert [waiting.request.id for waiting in router._queues["a"].all()] == [1, 2]
    assert {waiting.other for waiting in router._queues["b"].all()} == {"a"}  # they may come back
    assert router.load("a") == 10 * BLOCK
    assert router.load("b") == 12 * BLOCK
    assert {sent.id for _, sent in router.release(0.1)} == {1, 3}


@pytest.mark.parametrize("mode", MODES)
def test_a_move_never_overloads_its_target(mode):
    """Five lack 5 blocks each: 13 too many. After two moves of 6 blocks b is at its 12, and the third stays."""
    router, moves = router_with(["a", "b"], migration=mode)
    fill(router, "a", "b", 5, [1, 2, 3, 4, 5])
    router.tick(0.1)
    assert moves == [(5, "a", "b", 25, 6), (4, "a", "b", 20, 6)]


@pytest.mark.parametrize(("mode", "second"), [("greedy", (1, "a", "b", 6, 1)), ("batch", (2, "a", "b", 13, 9))])
def test_ranking_anew_takes_into_account_who_has_moved_already(mode, second):
    """Of 9 blocks each, a lacks 6, 7, 8 and b 1, 6, 3: the third gains 21 - 3 and moves first; 1 is still too many.

    At first the second gains more than the first, 13 - 6 to 6 - 1. At b the third goes before the second, not before
    the first: now it is 13 - 9 to 6 - 1.
    """
    router, moves = router_with(["a", "b"], migration=mode)
    for id, (at_a, at_b) in enumerate([(3, 8), (2, 3), (1, 6)], 1):
        prompt = tuple(range(100 * id, 100 * id + 9))
        warm(router, "a", prompt[:at_a], id=1000 + id)
        warm(router, "b", prompt[:at_b], id=2000 + id)
        router._queues["a"].add(Waiting(request(id, prompt), 0.0, "a", "b", (9 - at_a) * BLOCK))
    router.tick(0.1)
    assert moves == [(3, "a", "b", 21, 3), second]


@pytest.mark.parametrize("mode", MODES)
def test_a_long_wait_triggers_and_the_one_that_waits_alone_stays(mode):
    router, moves = router_with(["a", "b"], migration=mode, max_wait=3.0)
    fill(router, "a", "b", 2, [1, 2], length=6)
    router.tick(2.9)
    assert moves == []  # 10 blocks: within the limit
    router.tick(3.0)
    assert moves == [(2, "a", "b", 10, 6)]
    router.tick(9.0)
    assert len(moves) == 1


@pytest.mark.parametrize("late", ["overloaded", "waiting too long"])
def test_a_target_that_is_in_trouble_itself_is_left_alone(late):
    router, moves = router_with(["a", "b"], max_wait=3.0)
    fill(router, "a", "b", 4, [1, 2, 3, 4], now=0.0 if late == "overloaded" else 2.0)
    if late == "overloaded":
        router.fleet.send(router.fleet["b"], request(77, tuple(range(7_000, 7_013))), 0.0)
        router.tick(0.1)
    else:
        router.release(2.0)
        router.fleet.send(router.fleet["b"], request(77, (7_000,)), 0.0)
        old = prefix_for(router, "ab")
        router._queues["b"].add(Waiting(request(78, (old,)), 0.5, "b", "a", BLOCK))
        router.tick(3.5)
    assert moves == []


@pytest.mark.parametrize("mode", MODES)
def test_on_arrival_both_are_relieved_if_both_are_overloaded(mode):
    """a and b are overloaded; those of a that have c as their other go there as soon as the next one comes."""
    router, moves = router_with(["a", "b", "c"], migration=mode)
    fill(router, "a", "c", 3, [1, 2, 3])
    router.fleet.send(router.fleet["b"], request(77, tuple(range(7_000, 7_013))), 0.0)
    assert moves == []
    router.submit(request(9, (prefix_for(router, "ab"), 8_000)), 0.0)
    assert [(who, source, target) for who, source, target, *_ in moves] == [(3, "a", "c")]


def test_only_the_pair_unless_a_neighbour_is_allowed():
    """a and its partner b are overloaded, c is idle: the neighbour of a is b, that of b is c."""
    for allowed in (False, True):
        router, moves = router_with(["a", "b", "c"], allow_neighbor=allowed)
        fill(router, "a", "b", 4, [1, 2, 3, 4])
        router.fleet.send(router.fleet["b"], request(77, tuple(range(7_000, 7_013))), 0.0)
        router.tick(0.1)
        assert [move[:3] for move in moves] == ([(4, "a", "c"), (3, "a", "c")] if allowed else [])


arrivals = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.floats(0, 0.7)), min_size=1, max_size=60)


@settings(max_examples=25, deadline=None)
@given(arrivals, st.sampled_from(MODES), st.randoms(use_true_random=False))
def test_requests_are_conserved_stay_in_their_pair_and_wait_no_longer_than_they_must(items, mode, random):
    """Every move gains (`Moves`); nobody who waited too long is overtaken by one who came later."""
    router, moves = router_with(list("abcd"), migration=mode, max_wait=1.0)
    now, pairs, running, released = 0.0, {}, [], set()
    for id, (prefix, length, gap) in enumerate(items):
        now += gap
        one = request(id, (prefix, *range(1000 * (id + 1), 1000 * (id + 1) + length)))
        router.submit(one, now)
        pairs[id] = set(router.pair(one))
        router.tick(now)
        for name, sent in router.release(now):
            assert sent.id not in released
            released.add(sent.id)
            running.append((name, sent.id))
            left = [waiting for waiting in router._queues[name].all() if waiting.since <= now - 1.0]
            assert all((waiting.since, waiting.request.id) > (_since(items, sent.id), sent.id) for waiting in left)
        waiting = [entry for name in "abcd" for entry in router._queues[name].all()]
        assert {entry.request.id for entry in waiting} | released == set(range(id + 1))
        assert router.waiting() == len(waiting) == id + 1 - len(released)
        for name in "abcd":
            assert router._queues[name].tokens == sum(entry.missing for entry in router._queues[name].all())
        for entry in waiting:
            assert {entry.home, entry.other} == pairs[entry.request.id]
        if running and random.random() < 0.5:
            router.on_prefilled(*running.pop(0), now)
    assert all({source, target} == pairs[id] for id, source, target, *_ in moves)


def _since(items, id):
    return sum(gap for _, _, gap in items[: id + 1])
