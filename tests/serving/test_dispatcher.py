"""Coroutines that wait for a real policy. Time is moved by hand; `settled` lets all that can run, run."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps

import pytest
from made_up_requests import BLOCK

from equipoise import UserError
from equipoise.serving import DualMap, DualMapSettings, Fleet
from equipoise.serving.dispatcher import Dispatcher, Ticket
from equipoise.serving.prompts import Prompt

PATIENCE = 7.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Place:
    """A dispatcher over DualMap, and the coroutines that wait in it."""

    def __init__(self, replicas: str, **settings: float) -> None:
        self.clock = Clock()
        options = DualMapSettings(**settings)
        self.dispatcher = Dispatcher(lambda names: DualMap(Fleet(names, patience=PATIENCE), options), self.clock)
        self.dispatcher.set_replicas(list(replicas), float("inf"))

    def place(self, *blocks: int) -> asyncio.Task[Ticket]:
        return asyncio.ensure_future(self.dispatcher.place(Prompt(BLOCK * max(len(blocks), 1), blocks)))


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def with_loop(test: Callable[..., Coroutine[None, None, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*arguments, **named):
        asyncio.run(test(*arguments, **named))

    return run


@with_loop
async def test_one_prompt_is_sent_and_the_next_waits_for_its_first_token():
    place = Place("a")
    first, second = place.place(1, 2), place.place(3)
    await settled()
    assert first.result().replica == "a"
    assert not second.done()
    place.dispatcher.first_token(first.result())
    await settled()
    assert second.result().replica == "a"
    assert len(place.dispatcher) == 2
    place.dispatcher.done(first.result())
    place.dispatcher.done(first.result())
    place.dispatcher.done(second.result())
    assert len(place.dispatcher) == 0


@with_loop
async def test_an_answer_that_fails_before_its_first_token_lets_the_next_go():
    place = Place("a")
    first, second = place.place(1), place.place(2)
    await settled()
    place.dispatcher.done(first.result())
    await settled()
    assert second.done()


@with_loop
async def test_whoever_is_cancelled_no_longer_waits():
    """The third goes where the second would have gone."""
    place = Place("a")
    first, second, third = place.place(1), place.place(2), place.place(3)
    await settled()
    second.cancel()
    await settled()
    assert second.cancelled()
    assert len(place.dispatcher) == 2
    place.dispatcher.first_token(first.result())
    await settled()
    assert third.result().replica == "a"


@with_loop
async def test_one_cancelled_at_the_moment_when_it_is_sent_gives_its_place_back():
    """cancel() and the release come before its coroutine runs again."""
    place = Place("a")
    first, second, third = place.place(1), place.place(2), place.place(3)
    await settled()
    second.cancel()
    place.dispatcher.first_token(first.result())
    await settled()
    assert second.cancelled()
    assert third.done()
    assert len(place.dispatcher) == 2


async def all_but_one(place: Place, take_away: Callable[[], None]) -> list[str]:
    """Twenty prompts for a and b; when each has one, a is taken away. Returns who was told, once all are placed."""
    placed = [place.place(block) for block in range(20)]
    await settled()
    sent = [task.result() for task in placed if task.done()]
    assert sorted(ticket.replica for ticket in sent) == ["a", "b"]
    told = []
    for ticket in sent:
        ticket.give_up = lambda ticket=ticket: told.append(ticket.replica)
    take_away()
    for _ in range(20):
        await settled()
        for task in placed:
            if task.done():
                place.dispatcher.first_token(task.result())
    assert [task.result().replica for task in placed].count("b") == 19
    assert len(place.dispatcher) == 19
    return told


@with_loop
async def test_what_waited_for_a_replica_that_is_given_up_goes_elsewhere_and_what_it_was_sent_is_told():
    place = Place("ab")
    assert await all_but_one(place, lambda: place.dispatcher.give_up("a")) == ["a"]


@with_loop
async def test_what_a_replica_answers_while_it_is_stopped_goes_on():
    place = Place("ab")
    assert await all_but_one(place, lambda: place.dispatcher.set_replicas(["b"], float("inf"))) == []


@with_loop
async def test_one_that_was_decided_and_loses_its_replica_before_its_coroutine_runs_is_placed_anew():
    place = Place("a")
    first, second = place.place(1), place.place(2)
    await settled()
    place.dispatcher.first_token(first.result())
    assert place.dispatcher.waiting() == 0
    assert not second.done()
    place.dispatcher.set_replicas(["b"], float("inf"))
    assert (await second).replica == "b"
    assert len(place.dispatcher) == 1


@with_loop
async def test_prompts_without_blocks_begin_like_no_other():
    place = Place("abcdefg")
    placed = [place.place() for _ in range(30)]
    await settled()
    assert len({task.result().replica for task in placed if task.done()}) == 7


@with_loop
async def test_without_a_replica_all_that_waits_is_told_and_later_ones_go_to_the_next_replica():
    place = Place("a")
    place.place(1)
    waiting = place.place(2)
    await settled()
    place.dispatcher.set_replicas([], float("inf"))
    late = place.place(3)
    await settled()
    for task in (waiting, late):
        with pytest.raises(UserError, match="All replicas are down"):
            task.result()
    assert len(place.dispatcher) == 0
    place.dispatcher.set_replicas(["c"], float("inf"))
    again = place.place(3)
    await settled()
    assert again.result().replica == "c"


@with_loop
async def test_no_more_than_the_most_requests_run_on_a_replica():
    place = Place("a")
    place.dispatcher.set_replicas(["a"], 2)
    placed = [place.place(block) for block in range(3)]
    for _ in range(3):
        await settled()
        for task in placed:
            if task.done():
                place.dispatcher.first_token(task.result())
    assert [task.done() for task in placed] == [True, True, False]
    place.dispatcher.done(placed[0].result())
    await settled()
    assert placed[2].done()


@with_loop
async def test_a_replica_that_owes_an_answer_and_says_nothing_is_named_and_one_that_goes_on_is_not():
    place = Place("ab")
    placed = [place.place(block) for block in range(20)]
    await settled()
    sent = {task.result().replica: task.result() for task in placed if task.done()}
    place.clock.now = PATIENCE - 1
    place.dispatcher.heard(sent["b"])
    place.clock.now = PATIENCE + 1
    assert place.dispatcher.tick() == ["a"]


@with_loop
async def test_what_has_waited_too_long_moves_to_the_other_replica_of_its_pair():
    """All begin alike and so wait for the replica that has their beginning, until the longest wait of 3 s is over."""
    place = Place("ab", slo=1e9)
    first = place.place(1, 2, 3, 50)
    await settled()
    home = first.result().replica
    place.dispatcher.first_token(first.result())
    placed = [place.place(1, 2, 3, number) for number in range(4, 9)]
    await settled()
    assert [task.result().replica for task in placed if task.done()] == [home]
    place.clock.now = 2.9
    place.dispatcher.tick()
    await settled()
    assert sum(task.done() for task in placed) == 1
    place.clock.now = 3.0
    place.dispatcher.tick()
    await settled()
    assert sorted(task.result().replica for task in placed if task.done()) == ["a", "b"]


@with_loop
async def test_what_other_routers_sent_counts_as_load():
    """Equal caches: the lower time to first token wins once the SLO is passed, 9 blocks here."""
    place = Place("ab", slo=1.0, slo_fraction=1.0, prefill_seconds=1 / (9 * BLOCK))
    place.dispatcher.reported("a", 9 * BLOCK)
    placed = [place.place(block) for block in range(5)]
    await settled()
    assert placed[0].result().replica == "b"
    place.dispatcher.reported("a", 0)
    place.dispatcher.reported("b", 20 * BLOCK)
    later = place.place(77)
    for _ in range(5):
        await settled()
        for task in placed:
            if task.done():
                place.dispatcher.first_token(task.result())
    assert later.result().replica == "a"


@with_loop
async def test_its_own_requests_do_not_count_twice_when_a_replica_reports_them():
    place = Place("a")
    place.place(1, 2, 3)
    await settled()
    place.dispatcher.reported("a", 3 * BLOCK)
    [replica] = place.dispatcher._policy.fleet
    assert (replica.sent_tokens, replica.others_tokens) == (3 * BLOCK, 0)
    place.dispatcher.reported("a", 5 * BLOCK)
    assert replica.load == 5 * BLOCK


@with_loop
async def test_before_the_first_replica_nothing_is_known():
    place = Place("")
    assert place.dispatcher.replicas == []
    assert place.dispatcher.tick() == []
    assert place.dispatcher.waiting() == 0
    place.dispatcher.give_up("a")
    place.dispatcher.set_replicas(["a"], 3)
    assert place.dispatcher.replicas == ["a"]
