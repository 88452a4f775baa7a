"""A discrete-event simulation of routers and their replicas."""

from __future__ import annotations

import heapq
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from equipoise.errors import UserError
from equipoise.serving.costs import Costs
from equipoise.serving.faults import Fault
from equipoise.serving.request import Request
from equipoise.serving.router import Router
from equipoise.serving.simulated_replica import SimulatedReplica

TICK = 0.1  # seconds between two ticks of the router while requests wait (INFERRED)
SAMPLE = 1.0  # seconds between two samples of the load, and two searches for silent replicas
STATS = 0.5  # seconds between two reports of the replicas' load to several routers, as in Ray Serve by default here
PROGRESS = 2000  # requests between two reports of progress


@dataclass(slots=True)
class Outcome:
    """What one policy did.

    Attributes:
        ttft: per request, in order, s; of its last attempt where a replica was lost.
        hit_tokens: per request, prompt tokens found in the replica's cache.
        served_by: per request, the replica that finished it.
        load_cv: standard deviation of the replicas' load over its mean, at every sample at which there was any.
        retried: requests that were submitted again because a replica was lost.
        most_entries: largest number of entries in the routers' memory of prefixes.
        router_seconds: processor time spent in the routers.
    """

    ttft: list[float]
    hit_tokens: list[int]
    served_by: list[str]
    load_cv: list[float] = field(default_factory=list)
    retried: int = 0
    most_entries: int = 0
    router_seconds: float = 0.0


class Simulator:
    """Feeds requests to routers, lets simulated replicas answer, and notes what happens.

    Of several routers each gets the next request. They do not talk, but learn every half second what the replicas have
    to compute. The network takes no time. All is deterministic: events at the same time happen in the order in which
    they were planned, faults first, arrivals last.

    Args:
        routers: at least one; all of the same replicas.
        requests: by arrival; ids are 0 to len(requests) - 1.
        on_progress: called with the number of finished requests now and then.
    """

    def __init__(
        self,
        routers: Sequence[Router],
        requests: Sequence[Request],
        costs: Costs,
        faults: Sequence[Fault] = (),
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self._routers, self._requests, self._costs = routers, requests, costs
        self._on_progress = on_progress
        self._replicas = {replica.name: SimulatedReplica(costs, 0.0) for replica in routers[0].fleet}
        self._hung: set[str] = set()
        self._versions = dict.fromkeys(self._replicas, 0)  # what was planned for an older version no longer happens
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._planned = 0
        self._finished = 0
        self._ticking = False
        count = len(requests)
        self._outcome = Outcome([-1.0] * count, [0] * count, [""] * count)
        for fault in sorted(faults, key=lambda fault: fault.time):
            self._plan(fault.time, getattr(self, f"_{fault.kind}"), replica_name(fault.replica))

    def run(self) -> Outcome:
        """Simulate until every request is finished. Fails: UserError where all replicas are down."""
        if len(self._routers) > 1:
            self._plan(STATS, self._report)
        self._plan(0.0, self._sample)  # plans itself again while requests are unfinished, so there is always an event
        for request in self._requests:
            self._run_until(request.arrival)
            self._submit(request, request.arrival)
        while self._finished < len(self._requests):
            self._run_until(self._events[0][0])
        self._note_entries()
        return self._outcome

    def _run_until(self, now: float) -> None:
        """Everything that happens up to now."""
        events = self._events
        while events and events[0][0] <= now:
            at, _, happens, arguments = heapq.heappop(events)
            happens(at, *arguments)

    def _plan(self, at: float, happens: Callable[..., None], *arguments: object) -> None:
        self._planned += 1
        heapq.heappush(self._events, (at, self._planned, happens, arguments))

    def _submit(self, request: Request, now: float) -> None:
        start = time.process_time()
        router = self._router_of(request)
        router.submit(request, now)
        self._outcome.router_seconds += time.process_time() - start
        self._release(router, now)

    def _router_of(self, request: Request) -> Router:
        return self._routers[request.id % len(self._routers)]

    def _release(self, router: Router, now: float) -> None:
        start = time.process_time()
        dispatches = router.release(now)
        waits = router.waiting()
        self._outcome.router_seconds += time.process_time() - start
        for name, request in dispatches:
            if name not in self._hung:
                self._replicas[name].accept(request, now)
                self._replan(name)
        if waits and not self._ticking:
            self._ticking = True
            self._plan(now + TICK, self._tick)

    def _replan(self, name: str) -> None:
        self._versions[name] += 1
        at = self._replicas[name].next_time()
        if at < float("inf"):
            self._plan(at, self._answer, name, self._versions[name])

    def _answer(self, now: float, name: str, version: int) -> None:
        if self._versions[name] != version:
            return  # the replica's next event has changed since
        kind, request, hit_tokens = self._replicas[name].happen(now)
        start = time.process_time()
        router = self._router_of(request)
        if kind == "prefilled":
            router.on_prefilled(name, request.id, now)
        else:
            router.on_finished(name, request.id, now)
        self._outcome.router_seconds += time.process_time() - start
        if kind == "prefilled":
            self._outcome.ttft[request.id] = now - request.arrival
            self._outcome.hit_tokens[request.id] = hit_tokens
        else:
            self._finish(request, name)
        self._replan(name)
        self._release(router, now)

    def _finish(self, request: Request, name: str) -> None:
        assert not self._outcome.served_by[request.id], "a request finished twice"
        self._outcome.served_by[request.id] = name
        self._finished += 1
        if self._on_progress and (self._finished % PROGRESS == 0 or self._finished == len(self._requests)):
            self._on_progress(self._finished)

    def _tick(self, now: float) -> None:
        self._ticking = False
        for router in self._routers:
            start = time.process_time()
            router.tick(now)
            self._outcome.router_seconds += time.process_time() - start
            self._release(router, now)

    def _report(self, now: float) -> None:
        """All routers learn what the replicas have to compute."""
        for name in self._live():
            if name not in self._hung:
                pending = self._replicas[name].pending_tokens(now)
                for router in self._routers:
                    router.fleet.reported(name, pending)
        if self._finished < len(self._requests):
            self._plan(now + STATS, self._report)

    def _sample(self, now: float) -> None:
        """Note the load; give up replicas that gave no sign of life for too long."""
        loads = [self._load(name) for name in self._live()]
        if any(loads):
            self._outcome.load_cv.append(statistics.pstdev(loads) / statistics.fmean(loads))
        self._note_entries()
        for name in self._live():
            if name not in self._hung:
                for router in self._routers:
                    router.fleet.heard(name, now)  # as the tokens of its answers would show
        for name in dict.fromkeys(name for router in self._routers for name in router.fleet.silent(now)):
            self._lose(now, name)
        if self._finished < len(self._requests):
            self._plan(now + SAMPLE, self._sample)

    def _live(self) -> list[str]:
        return [replica.name for replica in self._routers[0].fleet]

    def _load(self, name: str) -> int:
        """Prompt tokens that wait in any router or at the replica, each counted by the router that has it."""
        return sum(router.load(name) - router.fleet[name].others_tokens for router in self._routers)

    def _note_entries(self) -> None:
        entries = sum(router.entries() for router in self._routers)
        self._outcome.most_entries = max(self._outcome.most_entries, entries)

    def _add(self, now: float, name: str) -> None:
        self._replicas[name] = SimulatedReplica(self._costs, now)
        self._versions[name] = self._versions.get(name, 0) + 1
        for router in self._routers:
            router.add_replica(name, now)

    def _hang(self, now: float, name: str) -> None:
        if name in self._replicas:  # it may have been given up already
            self._hung.add(name)
            self._versions[name] += 1

    def _die(self, now: float, name: str) -> None:
        if name in self._replicas:
            self._lose(now, name)

    def _lose(self, now: float, name: str) -> None:
        """A replica is gone: what it had not finished is submitted again."""
        self._hung.discard(name)
        self._versions[name] += 1
        del self._replicas[name]
        lost = [request for router in self._routers for request in router.remove_replica(name, now)]
        if lost and not self._replicas:
            raise UserError(
                f"All replicas are down at {now:g} s, and {len(self._requests) - self._finished} requests are not "
                "finished; let one live, or add one before."
            )
        self._outcome.retried += len(lost)
        for request in lost:
            self._submit(request, now)


def replica_name(number: int) -> str:
    """The name of a simulated replica."""
    return f"replica-{number}"
