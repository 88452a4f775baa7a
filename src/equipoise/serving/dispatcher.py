"""Between a server's coroutines and a policy: each waits until its request is to be sent, and says what came of it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

from equipoise.errors import UserError
from equipoise.serving.prompts import Prompt
from equipoise.serving.request import Request
from equipoise.serving.router import Router


class Ticket:
    """One request on its way.

    Attributes:
        request: as the policy knows it.
        replica: where it was sent, or is to be sent; None while it waits.
        give_up: called when that replica is given up; whoever reads the answer sets it.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.replica: str | None = None
        self.give_up: Callable[[], None] | None = None
        self.decided: asyncio.Future[str] = asyncio.get_running_loop().create_future()


class Dispatcher:
    """Asks a policy on behalf of coroutines, and tells it what replicas answer. All calls from one event loop.

    Args:
        build: makes the policy for the first replicas.
        clock: seconds, never going back.
    """

    def __init__(self, build: Callable[[list[str]], Router], clock: Callable[[], float]) -> None:
        self._build, self._clock = build, clock
        self._policy: Router | None = None
        self._ids = itertools.count()
        self._tickets: dict[int, Ticket] = {}

    def __len__(self) -> int:
        """Requests that wait or were sent."""
        return len(self._tickets)

    @property
    def replicas(self) -> list[str]:
        """Those that requests are sent to."""
        return [replica.name for replica in self._policy.fleet] if self._policy else []

    def waiting(self) -> int:
        """Requests that wait."""
        return self._policy.waiting() if self._policy else 0

    async def place(self, prompt: Prompt) -> Ticket:
        """Wait until the policy says where the request is to be sent: its ticket's ``replica``.

        It must be sent before anything else happens on the loop, and reported ``done`` in the end. A cancelled call
        withdraws the request. A prompt without blocks begins like no other.
        Fails: UserError where all replicas are down, or come to be.
        """
        assert self._policy, "no replica was ever named"
        while True:
            id = next(self._ids)
            ticket = Ticket(Request(id, self._clock(), prompt.tokens, 1, prompt.blocks or (-1 - id,)))
            self._submit(ticket)
            self._release()
            try:
                await ticket.decided
            except asyncio.CancelledError:
                if ticket.replica is not None:
                    self.done(ticket)
                elif self._tickets.pop(id, None):
                    self._policy.withdraw(id)
                raise
            if id in self._tickets:
                return ticket  # else its replica was taken away between the decision and this line

    def first_token(self, ticket: Ticket) -> None:
        """A request's first token came."""
        if self._policy and ticket.replica is not None:
            self._policy.on_prefilled(ticket.replica, ticket.request.id, self._clock())
            self._release()

    def heard(self, ticket: Ticket) -> None:
        """Another token came."""
        if ticket.replica is not None:
            self.alive(ticket.replica)

    def alive(self, replica: str) -> None:
        """A replica gave a sign of life."""
        if self._policy:
            self._policy.fleet.heard(replica, self._clock())

    def done(self, ticket: Ticket) -> None:
        """No more will come: the answer is complete, or failed, or nobody wants it. Said twice, it changes nothing."""
        ticket.give_up = None
        if self._tickets.pop(ticket.request.id, None) and self._policy and ticket.replica is not None:
            self._policy.on_finished(ticket.replica, ticket.request.id, self._clock())
            self._release()

    def reported(self, replica: str, pending_tokens: int) -> None:
        """What a replica says that it has to compute, for all routers."""
        if self._policy and replica in self._policy.fleet:
            self._policy.fleet.reported(replica, pending_tokens)

    def set_replicas(self, names: Sequence[str], most_running: int | float) -> None:
        """Use these replicas from now on. What waited for one that is gone goes elsewhere; what it answers goes on.

        Args:
            most_running: requests that one replica takes at a time.
        """
        if self._policy is None and names:
            self._policy = self._build(list(names))
        if self._policy is None:
            return
        self._policy.fleet.most_running = most_running
        known = set(self.replicas)
        for name in names:
            if name not in known:
                self._policy.add_replica(name, self._clock())
        for name in known.difference(names):
            self._remove(name)
        self._release()

    def give_up(self, name: str) -> None:
        """Use a replica no longer: what waited for it goes elsewhere, and who reads its answers is told."""
        if self._policy is None or name not in self._policy.fleet:
            return
        sent = self._remove(name)
        self._release()
        for ticket in sent:
            if ticket.give_up is not None:
                ticket.give_up()
                ticket.give_up = None

    def tick(self) -> list[str]:
        """Let waiting requests move. Returns the replicas that owe an answer and were silent for too long."""
        if self._policy is None:
            return []
        self._policy.tick(self._clock())
        self._release()
        return self._policy.fleet.silent(self._clock())

    def _remove(self, name: str) -> list[Ticket]:
        """Take a replica away, and submit again what waited for it. Returns what it was sent."""
        assert self._policy
        tickets = [self._tickets.pop(request.id) for request in self._policy.remove_replica(name, self._clock())]
        for ticket in tickets:
            if ticket.replica is None:
                self._submit(ticket)
        return [ticket for ticket in tickets if ticket.replica is not None]

    def _submit(self, ticket: Ticket) -> None:
        """Let the policy have it; where all replicas are down, its coroutine is told."""
        assert self._policy
        try:
            self._policy.submit(ticket.request, self._clock())
            self._tickets[ticket.request.id] = ticket
        except UserError as error:
            if not ticket.decided.done():  # done: its coroutine was cancelled and did not run since
                ticket.decided.set_exception(error)

    def _release(self) -> None:
        """Wake those that are to be sent now."""
        assert self._policy
        for name, request in self._policy.release(self._clock()):
            ticket = self._tickets[request.id]
            ticket.replica = name
            if not ticket.decided.done():
                ticket.decided.set_result(name)
