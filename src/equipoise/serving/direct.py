"""The policies that DualMap is compared with: each chooses a replica, and sends at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from equipoise.serving.fleet import Fleet, Replica
from equipoise.serving.request import Request
from equipoise.serving.router import Dispatch

Choose = Callable[[Fleet, Request, float], Replica]


class DirectRouter:
    """A router without queues: what is submitted is sent at once, and stays where it is.

    Args:
        choose: the policy; of replicas, request and time.
    """

    def __init__(self, fleet: Fleet, choose: Choose) -> None:
        self._fleet, self._choose = fleet, choose
        self._outbox: list[Dispatch] = []

    @property
    def fleet(self) -> Fleet:
        """What the router knows of its replicas."""
        return self._fleet

    def submit(self, request: Request, now: float) -> str:
        """Choose a replica. Fails: UserError where all replicas are down."""
        self._fleet.require_one()
        replica = self._choose(self._fleet, request, now)
        self._fleet.send(replica, request, now)
        self._outbox.append((replica.name, request))
        return replica.name

    def release(self, now: float) -> list[Dispatch]:
        """What was submitted since the last call."""
        released, self._outbox = self._outbox, []
        return released

    def withdraw(self, request_id: int) -> None:
        """Nothing waits here."""

    def on_prefilled(self, replica: str, request_id: int, now: float) -> None:
        """Note a first token."""
        self._fleet.prefilled(replica, request_id, now)

    def on_finished(self, replica: str, request_id: int, now: float) -> None:
        """Note a last token."""
        self._fleet.finished(replica, request_id, now)

    def tick(self, now: float) -> None:
        """Nothing waits here."""

    def add_replica(self, name: str, now: float) -> None:
        """Use one more replica."""
        self._fleet.add(name)

    def remove_replica(self, name: str, now: float) -> list[Request]:
        """Give a replica up. Returns its unfinished requests."""
        lost = self._fleet.remove(name)
        self._outbox = [dispatch for dispatch in self._outbox if dispatch[0] != name]
        return lost

    def waiting(self) -> int:
        """Requests that were submitted and not released."""
        return len(self._outbox)

    def load(self, name: str) -> int:
        """Prompt tokens that a replica has to compute."""
        return self._fleet[name].load

    def entries(self) -> int:
        """Entries in the router's memory of prefixes."""
        return self._fleet.cached_blocks()


def least_loaded(fleet: Fleet, request: Request, now: float) -> Replica:
    """The replica with the fewest prompt tokens to compute; ties to the fewest running blocks, then to the first.

    Source: the baseline of DualMap (arXiv 2602.06502). Differs: its tie rule is not published.
    """
    return min(fleet, key=_load)


def min_ttft(fleet: Fleet, request: Request, now: float) -> Replica:
    """The replica with the lowest estimated time to first token, of all: its tokens and those that the request lacks.

    Source: the baseline of DualMap (arXiv 2602.06502), as Mooncake schedules prefills (FAST'25). Differs: no transfer
    of caches between replicas.
    """
    return min(fleet, key=lambda replica: (replica.load + fleet.missing(replica, request), replica.running_blocks))


def affinity(fleet: Fleet, request: Request, now: float) -> Replica:
    """The replica with the longest cached prefix, if that is 10 % of the prompt; the least loaded one otherwise.

    Source: Ray Serve's PrefixCacheAffinityRouter with its shipped thresholds (10 %, no limit of imbalance). Differs: it
    compares characters; it answers a short match with the replica that caches least.
    """
    hits = {replica.name: fleet.hit_tokens(replica, request) for replica in fleet}
    if max(hits.values()) < 0.1 * request.input_tokens:
        return least_loaded(fleet, request, now)
    return min(fleet, key=lambda replica: (-hits[replica.name], *_load(replica)))


class RoundRobin:
    """One replica after the other."""

    def __init__(self) -> None:
        self._turn = 0

    def __call__(self, fleet: Fleet, request: Request, now: float) -> Replica:
        """The next replica."""
        self._turn += 1
        return list(fleet)[self._turn % len(fleet)]


@dataclass(slots=True)
class _Spent:
    """Tokens that a replica was given in the window."""

    latest: deque[tuple[float, int]]
    tokens: int = 0


class Preble:
    """Use a cached prefix that is longer than what is missing; otherwise take the replica with the lowest cost.

    The cost of a replica is the prompt tokens that it was given within the window, and those that this request lacks.
    Source: Preble (arXiv 2407.00023), E2: exploit when the cached prefix is longer than the rest, ties to the lowest
    cost; window of 3 minutes. Differs: no cost of eviction, no cost of decoding, no later re-balancing, no order of its
    own within a replica.

    Args:
        window: seconds of history that count.
    """

    def __init__(self, window: float = 180.0) -> None:
        self._window = window
        self._spent: dict[str, _Spent] = {}

    def __call__(self, fleet: Fleet, request: Request, now: float) -> Replica:
        """The replica for this request."""
        hits = {replica.name: fleet.hit_tokens(replica, request) for replica in fleet}
        longest = max(hits.values())
        exploits = 2 * longest > request.input_tokens
        best = min(
            (replica for replica in fleet if not exploits or hits[replica.name] == longest),
            key=lambda replica: self._cost(replica.name, now) + request.input_tokens - hits[replica.name],
        )
        spent, missing = self._spent[best.name], request.input_tokens - hits[best.name]
        spent.latest.append((now, missing))
        spent.tokens += missing
        return best

    def _cost(self, name: str, now: float) -> int:
        spent = self._spent.setdefault(name, _Spent(deque()))
        while spent.latest and spent.latest[0][0] < now - self._window:
            spent.tokens -= spent.latest.popleft()[1]
        return spent.tokens


def _load(replica: Replica) -> tuple[int, int]:
    return replica.load, replica.running_blocks
