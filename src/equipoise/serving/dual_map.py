"""DualMap: two hash rings give a request two replicas; the nearer cache wins while the SLO holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

from equipoise.serving.fleet import Fleet, Replica
from equipoise.serving.hotness import KeyLength
from equipoise.serving.queues import Queues
from equipoise.serving.request import Request
from equipoise.serving.rings import Pairs
from equipoise.serving.router import Dispatch
from equipoise.serving.settings import DualMapSettings
from equipoise.serving.waiting import Waiting


class DualMap:
    """Routes every request to one of two replicas that its first blocks name.

    Of the two, the one with the longer cached prefix, while the tokens that wait there and the request's own missing
    ones are within half the SLO; otherwise the one with the lower estimated time to first token. Requests wait here,
    and a replica gets the next when it has finished a prompt, so that they can still move when both are overloaded. The
    same requests, answers and times give the same decisions on every router.

    Args:
        replicas: names, each once; or a Fleet with its own limits.
        settings: limits and options.
        on_move: called for every move, before it: who, where to, tokens until its first token here and there.
    Fails: UserError without replicas or for a name that comes twice.
    Source: DualMap (arXiv 2602.06502) and its release's scheduler. Differs: see `Pairs`, `KeyLength` and `Queues`; a
    tie is broken by a hash of seed and request instead of a random generator, so that routers agree; a request that has
    waited ``max_wait`` is sent before all that rank higher, which bounds waiting (INFERRED).
    """

    def __init__(
        self,
        replicas: Sequence[str] | Fleet,
        settings: DualMapSettings | None = None,
        on_move: Callable[[Waiting, str, int, int], None] | None = None,
    ) -> None:
        self._settings = settings or DualMapSettings()
        self._fleet = replicas if isinstance(replicas, Fleet) else Fleet(replicas)
        self._pairs = Pairs(replica.name for replica in self._fleet)
        self._key_length = KeyLength(self._settings.window)
        self._queues = Queues(self._fleet, self._settings, self._pairs.after, on_move)
        self._waiting: dict[int, Waiting] = {}
        self._ready: dict[str, None] = {}  # replicas that may be sent something, in the order of events

    @property
    def fleet(self) -> Fleet:
        """What the router knows of its replicas."""
        return self._fleet

    @property
    def moved(self) -> int:
        """Moves of waiting requests so far."""
        return self._queues.moved

    def submit(self, request: Request, now: float) -> str:
        """Let a request wait for one of its two replicas, and relieve both if both are overloaded.

        Returns: the replica that it waits for now.
        Fails: UserError where all replicas are down.
        """
        self._fleet.require_one()
        self._key_length.observe(request.blocks)
        first, second = (self._fleet[name] for name in self.pair(request))
        home = self._choose(request, first, second)
        other = second if home is first else first
        waiting = Waiting(request, now, home.name, other.name, self._fleet.missing(home, request))
        self._queues[home.name].add(waiting)
        self._waiting[request.id] = waiting
        self._ready[home.name] = None
        both = dict.fromkeys((home.name, other.name))
        if all(self._queues.is_overloaded(name, now) for name in both):
            for name in both:
                self._relieve(name, now)
        return waiting.home

    def pair(self, request: Request) -> tuple[str, str]:
        """The two replicas of a request's key, as long as the key is now."""
        depth = self._key_length.depth(request.blocks, len(self._fleet))
        return self._pairs.of(request.blocks[depth - 1])

    def release(self, now: float) -> list[Dispatch]:
        """What is to be sent now: the longest cached prefix first, but first whoever has waited too long."""
        released = []
        for name in self._ready:
            queue, replica = self._queues[name], self._fleet[name]
            while len(queue) and self._has_room(replica, now):
                waiting = queue.next(now - self._settings.max_wait)
                queue.remove(waiting)
                self._fleet.send(replica, waiting.request, now)
                del self._waiting[waiting.request.id]
                released.append((name, waiting.request))
        self._ready.clear()
        return released

    def withdraw(self, request_id: int) -> None:
        """Forget a request that waits: nobody wants its answer any more."""
        waiting = self._waiting.pop(request_id)
        self._queues[waiting.home].remove(waiting)

    def on_prefilled(self, replica: str, request_id: int, now: float) -> None:
        """Note a first token; the replica may be sent the next prompt."""
        if self._fleet.prefilled(replica, request_id, now):
            self._ready[replica] = None

    def on_finished(self, replica: str, request_id: int, now: float) -> None:
        """Note a last token."""
        if self._fleet.finished(replica, request_id, now):
            self._ready[replica] = None

    def tick(self, now: float) -> None:
        """Relieve every replica that is overloaded."""
        for replica in self._fleet:
            if self._queues.is_overloaded(replica.name, now):
                self._relieve(replica.name, now)

    def add_replica(self, name: str, now: float) -> None:
        """Put a replica on both rings; about 2 / (n + 1) of the pairs change."""
        self._fleet.add(name)
        self._queues.open(name)
        self._pairs.add(name)

    def remove_replica(self, name: str, now: float) -> list[Request]:
        """Take a replica off both rings. Returns those it was sent and did not finish, and those that waited for it."""
        sent, waited = self._fleet.remove(name), self._queues.close(name)
        for request in waited:
            del self._waiting[request.id]
        self._ready.pop(name, None)
        self._pairs.remove(name)
        if len(self._fleet):
            self._queues.repair(name, self.pair)
        return sent + waited

    def waiting(self) -> int:
        """Requests that were submitted and not released."""
        return len(self._waiting)

    def load(self, name: str) -> int:
        """Prompt tokens that wait for a replica, or that it has to compute already."""
        return self._queues.load(name)

    def entries(self) -> int:
        """Entries in the router's memory of prefixes: blocks that replicas should hold, and the tree of key lengths."""
        return self._fleet.cached_blocks() + len(self._key_length)

    def _choose(self, request: Request, first: Replica, second: Replica) -> Replica:
        """The longer cached prefix within the SLO, else the lower time to first token; ties to fewer running blocks."""
        tokens = {
            replica.name: (self._fleet.missing(replica, request), self._queues.load(replica.name))
            for replica in (first, second)
        }
        coin = self._coin(request)

        def tie(replica: Replica) -> tuple[int, bool]:
            return replica.running_blocks, (replica is first) == coin

        nearer = min(first, second, key=lambda replica: (tokens[replica.name][0], *tie(replica)))
        if sum(tokens[nearer.name]) <= self._settings.route_limit:
            return nearer
        return min(first, second, key=lambda replica: (sum(tokens[replica.name]), *tie(replica)))

    def _coin(self, request: Request) -> bool:
        data = f"{self._settings.seed}/{request.id}".encode()
        return bool(blake2b(data, digest_size=1).digest()[0] & 1)

    def _has_room(self, replica: Replica, now: float) -> bool:
        """Takes one more, within the token budget, and idle or, where several prompts are allowed, lately heard of."""
        if len(replica.running) >= self._fleet.most_running:
            return False
        sent, settings = len(replica.sent), self._settings
        if sent == 0:
            return True
        lately = now - replica.prefilled_at < settings.fresh_seconds
        return sent < settings.in_flight and lately and replica.load < settings.route_limit

    def _relieve(self, name: str, now: float) -> None:
        self._ready.update(dict.fromkeys(self._queues.relieve(name, now)))
