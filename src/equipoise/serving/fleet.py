"""What a router knows of its replicas: what they were sent, what they answered, what they should hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from equipoise.errors import UserError, require
from equipoise.serving.prefix_cache import PrefixCache
from equipoise.serving.request import Request


@dataclass(slots=True, eq=False)
class Replica:
    """One replica, as the router sees it.

    Attributes:
        sent: tokens that each request lacks there, by request id, of those sent and not prefilled.
        sent_tokens: their sum.
        others_tokens: what the replica last said that it has to compute beside them, for other routers.
        running: requests sent and not finished, by id.
        running_blocks: the blocks of their prompts.
        prefilled_at: when it last finished a prompt, s.
        heard_at: when it last gave a sign of life while it owed something, s.
    """

    name: str
    cache: PrefixCache
    sent: dict[int, int] = field(default_factory=dict)
    sent_tokens: int = 0
    others_tokens: int = 0
    running: dict[int, Request] = field(default_factory=dict)
    running_blocks: int = 0
    prefilled_at: float = -float("inf")
    heard_at: float = 0.0

    @property
    def load(self) -> int:
        """Prompt tokens that it has to compute, as far as the router knows."""
        return self.sent_tokens + self.others_tokens


class Fleet:
    """All replicas of one router. Every answer names its replica: one that was given up changes nothing when it comes.

    Args:
        replicas: names, each once.
        cache_tokens: tokens that a replica's context cache keeps, as far as the router knows.
        block_tokens: tokens per block.
        patience: seconds after which a replica that owes an answer and gives no sign of life counts as down.

    Attributes:
        most_running: requests that one replica takes at a time; a router that can let the others wait does.
    Fails: UserError without replicas, for a name that comes twice, or a number that is not positive.
    """

    def __init__(
        self,
        replicas: Iterable[str],
        cache_tokens: int = 1_000_000,
        block_tokens: int = 512,
        patience: float = 60.0,
    ) -> None:
        require(0 < block_tokens <= cache_tokens, "block_tokens must be above 0 and at most cache_tokens.")
        require(patience > 0, f"patience must be above 0 s, not {patience}.")
        self._capacity, self._block_tokens, self._patience = cache_tokens // block_tokens, block_tokens, patience
        self.most_running = float("inf")
        self._replicas: dict[str, Replica] = {}
        for name in replicas:
            self.add(name)
        require(bool(self._replicas), "A router needs at least one replica.")

    def __len__(self) -> int:
        return len(self._replicas)

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas.values())

    def __getitem__(self, name: str) -> Replica:
        return self._replicas[name]

    def __contains__(self, name: str) -> bool:
        return name in self._replicas

    def add(self, name: str) -> None:
        """Add a replica with an empty cache. Fails: UserError where there is one of this name."""
        require(name not in self._replicas, f"There is already a replica {name!r}; choose another name.")
        self._replicas[name] = Replica(name, PrefixCache(self._capacity))

    def remove(self, name: str) -> list[Request]:
        """Forget a replica. Returns what it had not finished, by id. Fails: UserError for an unknown name."""
        if name not in self._replicas:
            raise UserError(f"There is no replica {name!r}; there are {', '.join(self._replicas) or 'none'}.")
        return [request for _, request in sorted(self._replicas.pop(name).running.items())]

    def require_one(self) -> None:
        """Fails: UserError where all replicas are down."""
        require(bool(self._replicas), "All replicas are down: a request cannot be sent anywhere; add a replica.")

    def hit_tokens(self, replica: Replica, request: Request) -> int:
        """Prompt tokens that the replica should hold; the last one is always computed."""
        return min(replica.cache.match(request.blocks) * self._block_tokens, request.input_tokens - 1)

    def missing(self, replica: Replica, request: Request) -> int:
        """Prompt tokens that the replica would have to compute."""
        return request.input_tokens - self.hit_tokens(replica, request)

    def send(self, replica: Replica, request: Request, now: float) -> None:
        """Note that a request was sent."""
        tokens = self.missing(replica, request)
        if not replica.running:
            replica.heard_at = now  # from here on it owes an answer
        replica.sent[request.id] = tokens
        replica.sent_tokens += tokens
        replica.running[request.id] = request
        replica.running_blocks += len(request.blocks)

    def prefilled(self, name: str, request_id: int, now: float) -> bool:
        """Note a first token. Returns False for an answer that nobody waits for."""
        replica = self._replicas.get(name)
        if replica is None or request_id not in replica.sent:
            return False
        replica.sent_tokens -= replica.sent.pop(request_id)
        replica.cache.use(replica.running[request_id].blocks)
        replica.prefilled_at = replica.heard_at = now
        return True

    def finished(self, name: str, request_id: int, now: float) -> bool:
        """Note a last token. Returns False for an answer that nobody waits for."""
        replica = self._replicas.get(name)
        if replica is None or request_id not in replica.running:
            return False
        replica.sent_tokens -= replica.sent.pop(request_id, 0)
        replica.running_blocks -= len(replica.running.pop(request_id).blocks)
        replica.heard_at = now
        return True

    def reported(self, name: str, pending_tokens: int) -> None:
        """Note the prompt tokens that a replica says it has to compute: what this router did not send is others'."""
        replica = self._replicas[name]
        replica.others_tokens = max(pending_tokens - replica.sent_tokens, 0)

    def heard(self, name: str, now: float) -> None:
        """Note a sign of life, such as a token of any answer."""
        if name in self._replicas:
            self._replicas[name].heard_at = now

    def silent(self, now: float) -> list[str]:
        """Replicas that owe an answer and gave no sign of life for longer than the patience."""
        return [
            replica.name
            for replica in self._replicas.values()
            if replica.running and now - replica.heard_at > self._patience
        ]

    def cached_blocks(self) -> int:
        """Blocks in all prefix caches: the router's memory, at most ``len(self) * cache_tokens / block_tokens``."""
        return sum(len(replica.cache) for replica in self._replicas.values())
