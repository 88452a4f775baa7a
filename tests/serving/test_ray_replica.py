"""Answers that are watched: read on one loop, watched on another in its own thread, as in Ray Serve."""

import asyncio
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="needs Ray: pip install 'equipoise[serve]'")

from ray.exceptions import ActorUnavailableError
from ray.serve.request_router import ReplicaResult

from equipoise.serving import DualMap, Request
from equipoise.serving.dispatcher import Dispatcher, Ticket
from equipoise.serving.ray_errors import ReplicaLostError
from equipoise.serving.ray_replica import ObservedResult


class Answer(ReplicaResult):
    """Items as they are put in; an exception is raised, None hangs."""

    def __init__(self, *items: Any) -> None:
        self.items = list(items)
        self.cancelled = threading.Event()
        self.callbacks: list[Callable[[Any], None]] = []

    async def get_async(self) -> Any:
        item = self.items.pop(0)
        if isinstance(item, Exception):
            raise item
        while item is None and not self.cancelled.is_set():
            await asyncio.sleep(0.01)
        if item is None:
            raise StopAsyncIteration  # as a stream whose call was cancelled may end
        return item

    __anext__ = get_rejection_response = get_async

    def __next__(self) -> Any:
        return self.items.pop(0)

    def get(self, timeout_s: float | None) -> Any:
        return self.items.pop(0)

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.callbacks.append(callback)

    def cancel(self) -> None:
        self.cancelled.set()

    def to_object_ref(self) -> Any:
        return "ref"

    async def to_object_ref_async(self) -> Any:
        return "ref"

    def to_object_ref_gen(self) -> Any:
        return "gen"


class Watch:
    """A router's loop in a thread, with one request that was sent to its only replica."""

    def __init__(self, answer: Answer, accepted: bool = True) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.dispatcher = Dispatcher(DualMap, time.monotonic)
        self.answer = answer
        self.result = self.call(self._send, accepted)
        [self.replica] = self.dispatcher._policy.fleet

    def _send(self, accepted: bool) -> ObservedResult:
        self.dispatcher.set_replicas(["a"], 99)
        self.ticket = Ticket(Request(7, 0.0, 1000, 1, (1, 2)))
        self.dispatcher._submit(self.ticket)
        self.dispatcher._release()
        return ObservedResult(self.answer, self.ticket, self.dispatcher, accepted)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """On the router's loop, after all that was asked of it before."""

        async def run() -> Any:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def ends(self, last: Any) -> None:
        """As Ray says it, from another thread."""
        for callback in self.answer.callbacks:
            callback(last)
        self.call(lambda: None)

    def state(self) -> tuple[int, int, int]:
        """Prompts not computed, requests running, blocks believed to be cached."""
        return self.call(lambda: (len(self.replica.sent), len(self.replica.running), len(self.replica.cache)))

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def watch(request):
    made = []

    def make(*items: Any, **more: bool) -> Watch:
        made.append(Watch(Answer(*items), **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_the_first_item_is_the_first_token_and_the_end_the_last(watch):
    one = watch("x", "y")
    assert one.state() == (1, 1, 0)
    assert asyncio.run(one.result.__anext__()) == "x"
    assert one.state() == (0, 1, 2)
    assert next(one.result) == "y"
    one.ends("y")
    assert one.state() == (0, 0, 2)
    assert one.ticket.give_up is None


@pytest.mark.parametrize(("last", "cached"), [("all", 2), (ValueError("no"), 0), (SimpleNamespace(cancelled=bool), 0)])
def test_an_answer_in_one_piece_has_both_at_its_end_unless_it_failed(watch, last, cached):
    one = watch("all")
    assert one.result.get(None) == "all"
    one.ends(last)
    assert one.state() == (0, 0, cached)


def test_one_that_is_not_accepted_is_over_and_leaves_nothing_behind(watch):
    one = watch(SimpleNamespace(accepted=False), accepted=False)
    assert not asyncio.run(one.result.get_rejection_response()).accepted
    assert one.state() == (0, 0, 0)
    one.ends("rejected")
    assert one.state() == (0, 0, 0)


@pytest.mark.parametrize("reading", [True, False])
def test_who_reads_is_told_that_the_replica_was_given_up_also_if_he_comes_later(watch, reading):
    one = watch(None)

    async def read() -> None:
        waiting = asyncio.ensure_future(one.result.__anext__())
        await asyncio.sleep(0.05 if reading else 0)
        one.loop.call_soon_threadsafe(one.dispatcher.give_up, "a")
        await waiting

    if not reading:
        one.call(one.dispatcher.give_up, "a")
    with pytest.raises(ReplicaLostError, match="given up"):
        asyncio.run(read())
    assert one.answer.cancelled.is_set()


def test_before_it_is_accepted_ray_is_told_in_its_own_words_and_sends_it_again(watch):
    one = watch(None, accepted=False)
    one.call(one.dispatcher.give_up, "a")
    with pytest.raises(ActorUnavailableError, match="given up"):
        asyncio.run(one.result.get_rejection_response())


def test_two_readers_are_both_told(watch):
    one = watch(None, None)

    async def read() -> list[Any]:
        waiting = [asyncio.ensure_future(one.result.get_async()) for _ in range(2)]
        await asyncio.sleep(0.05)
        one.loop.call_soon_threadsafe(one.dispatcher.give_up, "a")
        return await asyncio.gather(*waiting, return_exceptions=True)

    assert [type(error) for error in asyncio.run(read())] == [ReplicaLostError] * 2


def test_a_reader_whose_loop_is_gone_disturbs_nobody(watch):
    """A program that ended in the middle of an answer."""
    one = watch(None)
    loop = asyncio.new_event_loop()
    one.result._alarms.add(loop.create_future())
    loop.close()
    one.call(one.dispatcher.give_up, "a")
    assert one.call(lambda: one.dispatcher.replicas) == []


def test_errors_and_ends_of_the_answer_are_the_readers(watch):
    one = watch(ValueError("mine"))
    with pytest.raises(ValueError, match="mine"):
        asyncio.run(one.result.__anext__())


def test_the_rest_is_rays(watch):
    one = watch()
    assert one.result.to_object_ref() == asyncio.run(one.result.to_object_ref_async()) == "ref"
    assert one.result.to_object_ref_gen() == "gen"
    one.result.cancel()
    assert one.answer.cancelled.is_set()
