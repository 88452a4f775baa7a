"""A replica of Ray Serve whose answers are watched: when the first item comes, when the last, and if none does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from ray.exceptions import ActorUnavailableError
from ray.serve.request_router import (
    PendingRequest,
    ReplicaResult,  # pyright: ignore[reportPrivateImportUsage]
    RunningReplica,
)

from equipoise.serving.ray_errors import ReplicaLostError

if TYPE_CHECKING:
    from equipoise.serving.dispatcher import Dispatcher, Ticket
    from equipoise.serving.ray_router import PolicyRouter

HEARD_SECONDS = 1.0  # between two notes that an answer goes on

Item = TypeVar("Item")


class ObservedReplica(RunningReplica):
    """A running replica that gives watched answers.

    Args:
        router: knows the tickets of requests.
    """

    def __init__(self, replica_info: Any, router: PolicyRouter) -> None:
        super().__init__(replica_info)
        self._router = router

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> ReplicaResult:
        """Called by Ray to send a request."""
        ticket = self._router.ticket_of(pr)
        if ticket is None:
            return super().try_send_request(pr, with_rejection)
        try:
            result = super().try_send_request(pr, with_rejection)
        except BaseException:
            self._router.dispatcher.done(ticket)
            raise
        return ObservedResult(result, ticket, self._router.dispatcher, not with_rejection)


class ObservedResult(ReplicaResult):
    """An answer that tells the router of its first item, of later ones now and then, and of its end.

    Made on the router's loop; read on any loop, or on a thread without one. Who reads on a loop gets a ReplicaLostError
    when the replica is given up; who blocks a thread has to wait until Ray finds it dead.

    Args:
        accepted: whether the replica takes the request without being asked.
    """

    def __init__(self, result: ReplicaResult, ticket: Ticket, dispatcher: Dispatcher, accepted: bool) -> None:
        self._result, self._ticket, self._dispatcher, self._accepted = result, ticket, dispatcher, accepted
        self._loop = asyncio.get_running_loop()
        self._heard_at = 0.0
        self._is_lost = False
        self._alarms: set[asyncio.Future[None]] = set()  # of whoever reads now
        ticket.give_up = self._give_up
        result.add_done_callback(lambda last: self._loop.call_soon_threadsafe(self._end, last))

    async def get_rejection_response(self) -> Any:
        """Whether the replica takes the request: its first word. Before it, Ray sends the request again by itself."""
        try:
            answer = await self._unless_lost(self._result.get_rejection_response())
        except ReplicaLostError as error:
            raise ActorUnavailableError(str(error), None) from error
        self._accepted = answer is None or answer.accepted
        if not self._accepted:
            self._dispatcher.done(self._ticket)
        return answer

    async def __anext__(self) -> Any:
        item = await self._unless_lost(self._result.__anext__())
        self._hear()
        return item

    def __next__(self) -> Any:
        item = self._result.__next__()
        self._hear()
        return item

    async def get_async(self) -> Any:
        """The whole answer."""
        return await self._unless_lost(self._result.get_async())

    def get(self, timeout_s: float | None) -> Any:
        """The whole answer."""
        return self._result.get(timeout_s)

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call this with the last item or error."""
        self._result.add_done_callback(callback)

    def cancel(self) -> None:
        """Nobody wants it any more."""
        self._result.cancel()

    def to_object_ref(self) -> Any:
        """As Ray's."""
        return self._result.to_object_ref()

    async def to_object_ref_async(self) -> Any:
        """As Ray's."""
        return await self._result.to_object_ref_async()

    def to_object_ref_gen(self) -> Any:
        """As Ray's; its items are not watched."""
        return self._result.to_object_ref_gen()

    async def _unless_lost(self, item: Awaitable[Item]) -> Item:
        """The item, or a ReplicaLostError if the replica is given up before it comes."""
        task = asyncio.ensure_future(item)
        alarm = asyncio.get_running_loop().create_future()
        self._alarms.add(alarm)
        try:
            if not self._is_lost:  # asked after the alarm is set, so that one of both threads sees the other's
                await asyncio.wait((task, alarm), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._alarms.discard(alarm)
            task.cancel()
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # whatever it is, it is seen
        if self._is_lost:  # whatever came then: an end may be that of the cancelled call
            raise ReplicaLostError("The replica gave no sign of life and was given up.")
        return task.result()

    def _give_up(self) -> None:
        """On the router's loop."""
        self._is_lost = True
        self._result.cancel()
        for alarm in list(self._alarms):
            with suppress(RuntimeError):  # its loop is closed: nobody reads
                alarm.get_loop().call_soon_threadsafe(_ring, alarm)

    def _hear(self) -> None:
        now = time.monotonic()
        if self._heard_at == 0.0:
            self._loop.call_soon_threadsafe(self._dispatcher.first_token, self._ticket)
        elif now - self._heard_at >= HEARD_SECONDS:
            self._loop.call_soon_threadsafe(self._dispatcher.heard, self._ticket)
        else:
            return
        self._heard_at = now

    def _end(self, last: Any) -> None:
        """On the router's loop."""
        if self._accepted and not isinstance(last, Exception) and not hasattr(last, "cancelled"):
            self._dispatcher.first_token(
                self._ticket
            )  # of an answer in one piece; a gRPC call does not say how it ended
        self._dispatcher.done(self._ticket)


def _ring(alarm: asyncio.Future[None]) -> None:
    if not alarm.done():
        alarm.set_result(None)
