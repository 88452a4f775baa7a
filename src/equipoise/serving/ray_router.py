"""Ray Serve's request router with a policy of ours: requests wait here, where they can still move."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from functools import partial
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from equipoise.errors import UserError, require
from equipoise.serving.dispatcher import Dispatcher, Ticket
from equipoise.serving.ray_config import RouterOptions  # first: it says what to install where Ray is not
from equipoise.serving.ray_errors import NoReplicasError
from equipoise.serving.ray_replica import ObservedReplica

TICK = 0.1  # seconds between two looks at what waits, as in the replay

logger = logging.getLogger("ray.serve")


class PolicyRouter(RequestRouter):
    """Routes a deployment's requests by a policy of `equipoise.serving`.

    Set it with ``request_router_config=router_config(policy=...)`` on the deployment that answers. An argument of its
    calls must hold OpenAI's ``messages`` or ``prompt``. There is one router in each process that holds a handle; what
    other routers send, it learns from ``pending_tokens`` in what the deployment's ``record_routing_stats`` returns.
    That a prompt is computed it learns from the first item of a streamed answer, or else from the whole answer.
    """

    max_num_routing_tasks_cap = 100_000  # each request has a task that waits here; Ray's 50 would keep most from us

    def initialize_state(self, **options: Any) -> None:
        """Called by Ray with ``request_router_kwargs``: see `RouterOptions`. Fails: UserError for one it has not."""
        self._options = RouterOptions.of(options)
        self._reader = self._options.reader()
        self.dispatcher = Dispatcher(self._options.build, time.monotonic)
        self._tickets: dict[int, Ticket] = {}  # by identity of the pending request, while Ray holds it
        self._given_up: dict[str, Any] = {}  # silent replicas, with the last that they said of themselves
        self._ticking: asyncio.Task[None] | None = None

    @property
    def max_num_routing_tasks(self) -> int:
        """Tasks that wait for a replica: as many as there are requests."""
        return self.max_num_routing_tasks_cap

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Wait until the policy sends the request, and name its replica. A failure goes to whoever sent the request."""
        if pending_request is None or pending_request.future.done():
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # where the replica is full, Ray asks again, but not soon
        try:
            name = await self._place(pending_request)
        except UserError as error:
            if self.dispatcher.replicas:  # else all are down: Ray asks again when there is one, or `_tick` ends it
                pending_request.future.set_exception(error)
            return [candidate_replicas]
        return [[replica for replica in self._replicas.values() if _name(replica) == name]]

    def create_replica_wrapper(self, replica_info: Any) -> RunningReplica:
        """A replica whose answers are watched."""
        return ObservedReplica(replica_info, self)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray with all running replicas, whenever one comes, goes, or says something of itself."""
        super().update_replicas(replicas)
        if self._ticking is None:
            self._ticking = self._event_loop.create_task(_tick_forever(weakref.ref(self)))
        for replica in replicas:
            if self._given_up.get(_name(replica), replica.routing_stats) != replica.routing_stats:
                del self._given_up[_name(replica)]  # it says something new, so it lives
        names = [_name(replica) for replica in replicas if _name(replica) not in self._given_up]
        most = min((replica.max_ongoing_requests for replica in replicas), default=float("inf"))
        self.dispatcher.set_replicas(names, most)
        for replica in replicas:
            self.dispatcher.reported(_name(replica), replica.routing_stats)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Ray when a replica's process is found dead."""
        super().on_replica_actor_died(replica_id)
        self.dispatcher.remove(replica_id.unique_id)

    def ticket_of(self, pending_request: PendingRequest) -> Ticket:
        """The ticket of a request that is being sent, which from here on belongs to its answer."""
        return self._tickets.pop(id(pending_request))

    async def _place(self, pending: PendingRequest) -> str:
        """Where the request goes: as decided before, while that replica is there."""
        ticket = self._tickets.get(id(pending))
        if ticket is not None:
            if ticket.replica in self.dispatcher.replicas:
                return ticket.replica
            self._forget(id(pending), ticket)
        ticket = await self.dispatcher.place(self._reader.read([*pending.args, *pending.kwargs.values()]))
        self._tickets[id(pending)] = ticket
        forget = partial(self._forget, id(pending), ticket)
        pending.future.add_done_callback(lambda future: forget() if future.cancelled() else None)
        weakref.finalize(pending, forget)  # where it was never sent, whatever the reason
        assert ticket.replica is not None
        return ticket.replica

    def _forget(self, key: int, ticket: Ticket) -> None:
        if self._tickets.get(key) is ticket:
            del self._tickets[key]
            self.dispatcher.done(ticket)

    def _tick(self) -> None:
        """Let requests move, give up silent replicas, and end what waits while all are down."""
        for name in self.dispatcher.tick():
            logger.warning(f"Replica {name} owes answers and is silent; what it was sent is given up.")
            said = next((replica.routing_stats for replica in self._replicas.values() if _name(replica) == name), None)
            self._given_up[name] = said
            self.dispatcher.remove(name)
        if not self.dispatcher.replicas:
            self._refuse(time.time() - self._options.down_wait)

    def _refuse(self, before: float) -> None:
        """End requests that came before this time: no replica is there."""
        for pending in list(self._pending_requests_to_fulfill):
            if not pending.future.done() and pending.created_at <= before:
                pending.future.set_exception(NoReplicasError(self._deployment_id))
                self._cancel_routing_task_for_pending_request(pending)
                self._remove_pending_request_from_indices(pending)


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
