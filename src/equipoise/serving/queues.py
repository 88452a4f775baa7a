"""Every replica's queue, when a replica is overloaded, and which waiting requests move."""

from __future__ import annotations

from collections.abc import Callable

from equipoise.serving.fleet import Fleet
from equipoise.serving.request import Request
from equipoise.serving.settings import DualMapSettings
from equipoise.serving.waiting import Queue, TokensAhead, Waiting

Move = tuple[int, int, Waiting, str]  # gain negated in tokens, request id, who, where to: the lowest moves first


class Queues:
    """The queues of all replicas.

    Args:
        after: the neighbour of a replica.
        on_move: called for every move, before it: who, where to, tokens until its first token here and there.
    """

    def __init__(
        self,
        fleet: Fleet,
        settings: DualMapSettings,
        after: Callable[[str], str],
        on_move: Callable[[Waiting, str, int, int], None] | None = None,
    ) -> None:
        self._fleet, self._settings, self._after, self._on_move = fleet, settings, after, on_move
        self._limit = settings.overload_limit
        self._queues = {replica.name: Queue() for replica in fleet}
        self.moved = 0

    def __getitem__(self, name: str) -> Queue:
        return self._queues[name]

    def open(self, name: str) -> None:
        """A queue for a new replica."""
        self._queues[name] = Queue()

    def close(self, name: str) -> list[Request]:
        """Forget a replica's queue. Returns who waited there, the oldest first."""
        return [waiting.request for waiting in self._queues.pop(name).all()]

    def load(self, name: str) -> int:
        """Prompt tokens that wait for a replica, or that it has to compute already."""
        return self._queues[name].tokens + self._fleet[name].load

    def is_overloaded(self, name: str, now: float) -> bool:
        """More tokens than the limit, or someone has waited too long."""
        return self.load(name) > self._limit or self._is_late(name, now)

    def relieve(self, source: str, now: float) -> list[str]:
        """Move requests away from an overloaded replica while that brings them their first token earlier.

        The largest gain first, until the replica is within its limit again. One that waits alone stays.

        Returns: where they went, in the order of the moves.
        Source: DualMap (arXiv 2602.06502). ``greedy`` ranks anew after every move, as its release does; ``batch`` ranks
        once, as the paper says. Differs: a move of a batch that no longer gains when its turn comes is left out.
        """
        excess = self.load(source) - self._limit
        greedy = self._settings.migration == "greedy"
        moves = self._ranked(source, now)
        freed, targets = 0, []
        while moves and len(self._queues[source]) > 1 and not 0 < excess <= freed:
            _, _, waiting, target = moves.pop(0)
            if not greedy and self._gain(waiting, target, now) <= 0:
                continue
            freed += waiting.missing
            targets.append(target)
            self._move(waiting, target)
            if greedy:
                moves = self._ranked(source, now)
        return targets

    def repair(self, gone: str, pair: Callable[[Request], tuple[str, str]]) -> None:
        """After a replica is gone: those who had it as their other get the other one of their new pair."""
        for queue in self._queues.values():
            for waiting in queue.with_other(gone):
                queue.remove(waiting)
                first, second = pair(waiting.request)
                waiting.other = second if first == waiting.home else first
                queue.add(waiting)

    def _is_late(self, name: str, now: float) -> bool:
        return now - self._queues[name].oldest() >= self._settings.max_wait

    def _ranked(self, source: str, now: float) -> list[Move]:
        """All moves that gain, the best first."""
        queue = self._queues[source]
        if len(queue) < 2:
            return []
        targets = {other: self._target(source, other, now) for other in queue.others()}
        if not any(targets.values()):
            return []
        here = queue.tokens_ahead()
        moves = []
        for other, target in targets.items():
            if target is None:
                continue
            there = self._queues[target].tokens_ahead()
            for waiting in queue.with_other(other):
                gain = self._gain_at(waiting, target, here, there)
                if gain > 0:
                    moves.append((-gain, waiting.request.id, waiting, target))
        return sorted(moves, key=lambda move: move[:2])

    def _target(self, source: str, other: str, now: float) -> str | None:
        """Where those with this other replica may go: there; where it is overloaded, to a neighbour if allowed."""
        choices = [other]
        if self._settings.allow_neighbor:
            choices += [self._after(source), self._after(other)]
        for name in choices:
            if name != source and not self.is_overloaded(name, now):
                return name
        return None

    def _gain(self, waiting: Waiting, target: str, now: float) -> int:
        if self._is_late(target, now):
            return 0
        here, there = self._queues[waiting.home].tokens_ahead(), self._queues[target].tokens_ahead()
        return self._gain_at(waiting, target, here, there)

    def _gain_at(self, waiting: Waiting, target: str, here: TokensAhead, there: TokensAhead) -> int:
        """Tokens by which a move brings the first token nearer; 0 where it would overload the target."""
        missing = self._fleet.missing(self._fleet[target], waiting.request)
        if self.load(target) + missing > self._limit:
            return 0
        return self._until_first(waiting, waiting.home, waiting.missing, here) - self._until_first(
            waiting, target, missing, there
        )

    def _until_first(self, waiting: Waiting, name: str, missing: int, ahead: TokensAhead) -> int:
        return self._fleet[name].load + ahead.of(waiting.rank_with(missing)) + missing

    def _move(self, waiting: Waiting, target: str) -> None:
        source = waiting.home
        missing = self._fleet.missing(self._fleet[target], waiting.request)
        if self._on_move is not None:
            here = self._until_first(waiting, source, waiting.missing, self._queues[source].tokens_ahead())
            there = self._until_first(waiting, target, missing, self._queues[target].tokens_ahead())
            self._on_move(waiting, target, here, there)
        self._queues[source].remove(waiting)
        waiting.home, waiting.other, waiting.missing = target, source, missing
        self._queues[target].add(waiting)
        self.moved += 1
