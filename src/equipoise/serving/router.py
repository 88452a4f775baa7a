"""What every router does for its driver: a simulator, or a server's routing hook."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from equipoise.serving.fleet import Fleet
from equipoise.serving.request import Request

Dispatch = tuple[str, Request]  # send this request to this replica, now


@runtime_checkable
class Router(Protocol):
    """A policy with its own queues and estimates; it reads no clock and does no input or output.

    The driver calls ``submit`` for a new request, then sends what ``release`` returns; reports what replicas answer;
    and calls ``tick`` regularly. ``now`` is seconds on the driver's clock, never going back.
    """

    @property
    def fleet(self) -> Fleet:
        """What the router knows of its replicas."""
        ...

    def submit(self, request: Request, now: float) -> str:
        """Decide where a request goes, or waits to go. Fails: UserError where all replicas are down."""
        ...

    def release(self, now: float) -> list[Dispatch]:
        """What is to be sent now; it counts as sent."""
        ...

    def withdraw(self, request_id: int) -> None:
        """Forget a request that waits: nobody wants its answer any more."""
        ...

    def on_prefilled(self, replica: str, request_id: int, now: float) -> None:
        """A replica gave a request's first token. An answer that nobody waits for changes nothing."""
        ...

    def on_finished(self, replica: str, request_id: int, now: float) -> None:
        """A replica gave a request's last token. An answer that nobody waits for changes nothing."""
        ...

    def tick(self, now: float) -> None:
        """Move waiting requests, if the policy does."""
        ...

    def add_replica(self, name: str, now: float) -> None:
        """Use one more replica. Fails: UserError where there is one of this name."""
        ...

    def remove_replica(self, name: str, now: float) -> list[Request]:
        """Give a replica up. Returns its unfinished requests, which the driver submits again, or reports as failed."""
        ...

    def waiting(self) -> int:
        """Requests that were submitted and not released."""
        ...

    def load(self, name: str) -> int:
        """Prompt tokens that wait for a replica, or that it has to compute already."""
        ...

    def entries(self) -> int:
        """Entries in the router's memory of prefixes."""
        ...
