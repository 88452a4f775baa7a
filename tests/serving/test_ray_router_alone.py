"""The router without a cluster: what Ray calls, with replicas that only have a name, stats and a queue."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial, wraps
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="needs Ray: pip install 'equipoise[serve]'")

from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest, RunningReplica

from equipoise import UserError
from equipoise.serving.dispatcher import Ticket
from equipoise.serving.ray_errors import NoReplicasError
from equipoise.serving.ray_router import TICK, DualMapRouter, PolicyRouter, _name

ID = DeploymentID("model", "app")
BLOCK = 512


class Replica(RunningReplica):
    """A name, stats, and a queue length that comes when it is let."""

    replica_id = routing_stats = None
    max_ongoing_requests = 5

    def __init__(self, name: str, pending_tokens: Any = 0) -> None:
        self.replica_id = ReplicaID(name, ID)
        self.routing_stats = {"pending_tokens": pending_tokens}
        self.answers = asyncio.Event()
        self.answers.set()
        self.error: Exception | None = None
        self.asked = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.asked += 1
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        return 0


def pending(tokens: int = 3 * BLOCK, parent: str | None = None, **argument: Any) -> PendingRequest:
    metadata = RequestMetadata(request_id="r", internal_request_id=parent or str(time.monotonic_ns()))
    return PendingRequest(args=[argument or {"prompt": list(range(tokens))}], kwargs={}, metadata=metadata)


def with_loop(test: Callable[..., Coroutine[None, None, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*arguments, **named):
        asyncio.run(test(*arguments, **named))

    return run


def router(*replicas: Replica, kind: type[PolicyRouter] = PolicyRouter, **options: Any) -> PolicyRouter:
    made = kind(deployment_id=ID, handle_source=DeploymentHandleSource.REPLICA, self_actor_id="one")
    made.initialize_state(**options)
    made.update_replicas(list(replicas))
    return made


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def asked(made: PolicyRouter, request: PendingRequest, **more: bool) -> asyncio.Task[RunningReplica]:
    """As Ray asks for every request."""
    return asyncio.ensure_future(made._choose_replica_for_request(request, **more))


async def sent(made: PolicyRouter, request: PendingRequest) -> Ticket:
    """Asked for and sent, as Ray does it in one go."""
    await made._choose_replica_for_request(request)
    ticket = made.ticket_of(request)
    assert ticket is not None
    return ticket


@with_loop
async def test_a_request_waits_until_the_policy_sends_it():
    made = router(Replica("a"))
    first = await sent(made, pending())
    waiting = asyncio.ensure_future(sent(made, pending()))
    await settled()
    assert not waiting.done()
    assert made.num_pending_requests == 1
    made.dispatcher.first_token(first)
    assert (await waiting).replica == "a"
    assert made.num_pending_requests == 0


@with_loop
async def test_every_request_may_wait_here_at_once_also_those_of_one_parent_request():
    """Ray's own routers would have two tasks per replica, and find requests by the parent's id."""
    made = router(Replica("a"))
    waiting = [asyncio.ensure_future(sent(made, pending(block + 1, parent="one"))) for block in range(70)]
    await settled()
    assert made.num_pending_requests == 69
    for _ in range(70):
        await settled()
        for task in waiting:
            if task.done():
                made.dispatcher.done(task.result())
    assert all(task.done() for task in waiting)
    assert len(made.dispatcher) == 0


@with_loop
async def test_one_that_is_cancelled_gives_its_place_back_and_so_does_one_that_is_sent_by_other_ways():
    made = router(Replica("a"))
    first = await sent(made, pending())
    cancelled, other, last = (asked(made, pending()) for _ in range(3))
    await settled()
    cancelled.cancel()
    made.dispatcher.first_token(first)
    assert _name(await other) == "a"  # nobody takes its ticket
    assert _name(await last) == "a"
    await settled()
    assert len(made.dispatcher) == 1
    assert made._tickets == {}


@with_loop
async def test_a_request_that_was_refused_waits_before_it_is_asked_for_again():
    made = router(Replica("a"))
    request = pending()
    again = asked(made, request, is_retry=True)
    await settled()
    assert not again.done()
    assert made.num_pending_requests == len(made.dispatcher) == 0
    assert _name(await again) == "a"


@with_loop
async def test_a_replica_that_died_is_used_no_longer():
    a, b = Replica("a"), Replica("b")
    made = router(a, b)
    made.on_replica_actor_died(a.replica_id)
    assert made.dispatcher.replicas == ["b"]
    assert (await sent(made, pending())).replica == "b"


@with_loop
async def test_a_call_without_a_prompt_fails_by_itself():
    made = router(Replica("a"))
    with pytest.raises(UserError, match="neither messages nor a prompt"):
        await asked(made, pending(question="none"))
    assert (await sent(made, pending())).replica == "a"


@with_loop
async def test_what_is_sent_to_no_chosen_replica_has_no_ticket():
    made = router(Replica("a"))
    [[replica]] = await made.choose_replicas(list(made.curr_replicas.values()))
    assert _name(replica) == "a"
    assert made.ticket_of(pending()) is None


@pytest.mark.parametrize("wrong", ["many", None, float("nan"), [3]])
@with_loop
async def test_what_replicas_report_reaches_the_policy_and_what_is_no_number_is_said_once(wrong, caplog):
    a, b = Replica("a", 7 * BLOCK), Replica("b", wrong)
    made = router(a, b)
    made.update_replicas([a, b])
    loads = {replica.name: replica.load for replica in made.dispatcher._policy.fleet}
    assert loads == {"a": 7 * BLOCK, "b": 0}
    assert made.dispatcher._policy.fleet.most_running == 5
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        f"Replica b reports pending_tokens={wrong!r}; it must be a number to be heeded."
    ]


async def silent(made: PolicyRouter, name: str) -> Ticket:
    """Let a replica owe an answer for longer than the patience of three ticks. Returns its ticket."""
    tickets = []
    while not tickets or tickets[-1].replica != name:
        tickets.append(await sent(made, pending(len(tickets) + 1)))
    made.dispatcher._policy.fleet[name].heard_at = -1e9
    return tickets[-1]


@with_loop
async def test_a_silent_replica_that_does_not_say_how_many_requests_it_has_is_given_up_until_it_does(monkeypatch):
    monkeypatch.setattr("equipoise.serving.ray_router.ASK_SECONDS", 5 * TICK)
    a, b = Replica("a"), Replica("b")
    made = router(a, b, patience=60.0, in_flight=99, fresh_seconds=1e9, slo=1e9)
    while not a.asked:  # by Ray, since it is new
        await settled()
    ticket = await silent(made, "a")
    told = asyncio.Event()
    ticket.give_up = told.set
    a.answers.clear()
    before = a.asked
    await told.wait()
    assert a.asked == before + 1
    assert made.dispatcher.replicas == ["b"]
    made.update_replicas([a, b])
    assert made.dispatcher.replicas == ["b"]
    a.answers.set()
    await settled()
    assert made.dispatcher.replicas == ["b", "a"]
    assert made._asked == made._given_up == set()


@with_loop
async def test_one_that_says_it_lives_keeps_what_it_was_sent(monkeypatch):
    """A long answer in one piece, perhaps."""
    made = router(Replica("a"), Replica("b"), patience=60.0, in_flight=99, fresh_seconds=1e9, slo=1e9)
    ticket = await silent(made, "a")
    ticket.give_up = partial(pytest.fail, "it lives")
    await asyncio.sleep(3 * TICK)
    assert made.dispatcher.replicas == ["a", "b"]
    assert made.dispatcher._policy.fleet["a"].heard_at > 0
    assert made._asked == set()


@with_loop
async def test_one_that_turns_out_to_be_dead_is_not_let_in_again_and_the_network_is_asked_twice(monkeypatch):
    a = Replica("a")
    made = router(a, Replica("b"))
    a.error = ActorUnavailableError("network", None)
    asking = asyncio.ensure_future(made._lives(a))
    await asyncio.sleep(TICK)
    assert not asking.done()
    a.error = ActorDiedError()
    assert not await asking
    a.error = None
    made._given_up.add("a")
    made.update_replicas([Replica("b")])
    assert not await made._lives(a)
    assert made._given_up == set()


@with_loop
async def test_while_none_is_there_requests_are_refused_after_a_while_and_not_before():
    made = router(down_wait=5 * TICK)
    early = asked(made, pending())
    await asyncio.sleep(2 * TICK)
    assert not early.done()
    with pytest.raises(NoReplicasError, match=r"No replica of .*model.* is running; try again soon"):
        await early
    late = asked(made, pending())
    await asyncio.sleep(TICK)
    assert not late.done(), "one that comes later may wait as long"
    made.update_replicas([Replica("c")])
    assert _name(await late) == "c"


@with_loop
async def test_when_all_go_what_waits_is_refused_or_goes_to_the_next():
    made = router(Replica("a"), down_wait=3 * TICK)
    await sent(made, pending())
    waiting = [asked(made, pending()) for _ in range(2)]
    await settled()
    made.update_replicas([])
    await settled()
    assert not any(task.done() for task in waiting)
    waiting[0].cancel()
    with pytest.raises(NoReplicasError):
        await waiting[1]


def test_the_router_of_one_policy_takes_no_other():
    made = DualMapRouter(deployment_id=ID, handle_source=DeploymentHandleSource.REPLICA, self_actor_id="one")
    with pytest.raises(UserError, match="DualMapRouter has one policy; use PolicyRouter"):
        made.initialize_state(policy="affinity")
