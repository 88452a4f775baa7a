"""Ray Serve's request router with a policy of ours: requests wait here, where they can still move."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import weakref
from collections.abc import Coroutine
from typing import Any

from ray.exceptions import ActorDiedError, RayError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from equipoise.errors import UserError, require
from equipoise.serving.dispatcher import Dispatcher, Ticket
from equipoise.serving.ray_config import RouterOptions  # first: it says what to install where Ray is not
from equipoise.serving.ray_errors import NoReplicasError
from equipoise.serving.ray_replica import ObservedReplica

TICK = 0.1  # seconds between two looks at what waits, as in the replay
ASK_SECONDS = 3.0  # in which a silent replica must say how many requests it has

logger = logging.getLogger("ray.serve")


class PolicyRouter(RequestRouter):
    """Routes a deployment's requests by a policy of `equipoise.serving`.

    Set it with ``request_router_config=router_config(policy=...)`` on the deployment that answers. An argument of its
    calls must hold OpenAI's ``messages``, ``prompt`` or ``input``. There is one router in each process that holds a
    handle; what other routers send, it learns from ``pending_tokens`` in what the deployment's
    ``record_routing_stats`` returns. That a prompt is computed it learns from the first item of a streamed answer, or
    else from the whole answer.
    """

    def initialize_state(self, **options: Any) -> None:
        """Called by Ray with ``request_router_kwargs``: see `RouterOptions`. Fails: UserError for one it has not."""
        known = hasattr(RequestRouter, "_choose_replica_for_request")
        require(known, "This Ray asks routers in another way than Ray 2.60; install that, or a newer Equipoise.")
        self._options = RouterOptions.of(options)
        self._reader = self._options.reader()
        self.dispatcher = Dispatcher(self._options.build, time.monotonic)
        self._tickets: dict[int, Ticket] = {}  # by identity of the pending request, until it is sent
        self._given_up: set[str] = set()  # replicas that were silent, until they say something
        self._asked: set[str] = set()  # replicas that are silent, and were asked
        self._warned: set[str] = set()  # replicas that report something else than a number
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_pending_requests(self) -> int:
        """Requests that wait here."""
        return self.dispatcher.waiting()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Wait until the policy sends the request, and name its replica.

        The request must be sent before anything else happens on this loop.
        Fails: UserError for a call without a prompt; NoReplicasError where no replica is there for too long.
        """
        if pending_request is None:
            return [candidate_replicas]
        prompt = self._reader.read([*pending_request.args, *pending_request.kwargs.values()])
        while True:
            await self._wait_for_a_replica()
            try:
                ticket = await self.dispatcher.place(prompt)
            except UserError:
                continue  # all are down since
            self._tickets[id(pending_request)] = ticket
            self._event_loop.call_soon(self._forget, id(pending_request), ticket)
            return [[replica for replica in self._replicas.values() if _name(replica) == ticket.replica]]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Called by Ray for every request. Its own way to `choose_replicas` leads through few tasks, out of order."""
        if is_retry:  # the replica was full of other routers' requests, or died: not at once, the later the longer
            age = time.time() - pending_request.created_at
            await asyncio.sleep(min(max(age / 8, self.initial_backoff_s), self.max_backoff_s))
        [[replica]] = await self.choose_replicas(self._replicas_list, pending_request)
        self._record_queue_wait_time(pending_request)
        return replica

    def create_replica_wrapper(self, replica_info: Any) -> RunningReplica:
        """A replica whose answers are watched."""
        return ObservedReplica(replica_info, self)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray with all running replicas, whenever one comes, goes, or says something of itself."""
        super().update_replicas(replicas)
        if not self._tasks:
            self._start(_tick_forever(weakref.ref(self)))
        self._use_replicas()
        for replica in replicas:
            self._note_stats(_name(replica), replica.routing_stats)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Ray when a replica's process is found dead."""
        super().on_replica_actor_died(replica_id)
        self._use_replicas()

    def ticket_of(self, pending_request: PendingRequest) -> Ticket | None:
        """The ticket of a request that is being sent, which from here on belongs to its answer.

        None for what Ray sends without having asked for a replica, such as a broadcast.
        """
        return self._tickets.pop(id(pending_request), None)

    def _forget(self, key: int, ticket: Ticket) -> None:
        """A request that was not sent at once is sent by other ways, such as a reserved slot, and not watched."""
        if self._tickets.get(key) is ticket:
            del self._tickets[key]
            self.dispatcher.done(ticket)

    async def _wait_for_a_replica(self) -> None:
        until = time.monotonic() + self._options.down_wait
        while not self.dispatcher.replicas:
            if time.monotonic() >= until:
                raise NoReplicasError(self._deployment_id)
            await asyncio.sleep(TICK)

    def _use_replicas(self) -> None:
        """Those that Ray lists, without those that were given up. What the others still answer goes on."""
        listed = {_name(replica) for replica in self._replicas.values()}
        self._given_up &= listed
        most = min((replica.max_ongoing_requests for replica in self._replicas.values()), default=float("inf"))
        self.dispatcher.set_replicas(sorted(listed - self._given_up), most)

    def _note_stats(self, name: str, stats: dict[str, Any]) -> None:
        tokens = stats.get("pending_tokens", 0)
        if isinstance(tokens, int | float) and math.isfinite(tokens):
            self.dispatcher.reported(name, round(tokens))
        elif name not in self._warned:
            self._warned.add(name)
            logger.warning(f"Replica {name} reports pending_tokens={tokens!r}; it must be a number to be heeded.")

    def _tick(self) -> None:
        """Let requests move, and ask silent replicas whether they live."""
        silent = set(self.dispatcher.tick()) - self._asked
        for replica in self._replicas.values():
            if _name(replica) in silent:
                self._asked.add(_name(replica))
                self._start(self._ask(replica))

    async def _ask(self, replica: RunningReplica) -> None:
        """Give a silent replica up if it does not say how many requests it has; use it again when it does."""
        name = _name(replica)
        answer = asyncio.ensure_future(self._lives(replica))
        await asyncio.wait((answer,), timeout=ASK_SECONDS)
        if not answer.done():
            logger.warning(f"Replica {name} owes answers and is silent; what it was sent is given up.")
            self._given_up.add(name)
            self.dispatcher.give_up(name)
        if await answer:
            self.dispatcher.alive(name)
            self._given_up.discard(name)
            self._use_replicas()
        self._asked.discard(name)

    async def _lives(self, replica: RunningReplica) -> bool:
        """Wait until the replica answers; False once it is dead or gone."""
        while replica in self._replicas.values():
            try:
                await replica.get_queue_len(deadline_s=ASK_SECONDS)
                return True
            except ActorDiedError:
                return False
            except RayError:
                await asyncio.sleep(1.0)  # the network, perhaps
        return False

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._event_loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class DualMapRouter(PolicyRouter):
    """`PolicyRouter` with DualMap: two replicas for every prompt's beginning, the same two in every router."""

    def initialize_state(self, **options: Any) -> None:
        """Called by Ray with ``request_router_kwargs``: see `RouterOptions`. Fails: UserError for another policy."""
        super().initialize_state(**options)
        require(self._options.policy == "dual_map", "DualMapRouter has one policy; use PolicyRouter for another.")


def _name(replica: RunningReplica) -> str:
    return replica.replica_id.unique_id


async def _tick_forever(router: weakref.ref[PolicyRouter]) -> None:
    """Until Ray drops the router."""
    while (alive := router()) is not None:
        try:
            alive._tick()
        except Exception:
            logger.exception("The router's tick failed; the next one comes.")
        del alive
        await asyncio.sleep(TICK)
