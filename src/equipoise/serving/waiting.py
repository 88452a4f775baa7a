"""The requests that wait for one replica."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import accumulate

from equipoise.serving.request import Request

Rank = tuple[int, float, int]  # cached tokens negated, submitted, id: the lowest goes first


@dataclass(slots=True, eq=False)
class Waiting:
    """One waiting request.

    Attributes:
        since: when it was submitted, s.
        home: the replica that it waits for.
        other: the other replica of its pair.
        missing: prompt tokens that its home would have to compute, as estimated when it came there.
    """

    request: Request
    since: float
    home: str
    other: str
    missing: int

    @property
    def rank(self) -> Rank:
        """Its place at home."""
        return self.rank_with(self.missing)

    def rank_with(self, missing: int) -> Rank:
        """Its place where it lacks so many tokens: the longest cached prefix goes first, then the earliest."""
        return missing - self.request.input_tokens, self.since, self.request.id


class Queue:
    """Requests that wait for one replica, by rank and by age. Additions and removals are O(log n) comparisons."""

    def __init__(self) -> None:
        self._by_rank: list[tuple[Rank, Waiting]] = []
        self._by_age: list[tuple[float, int, Waiting]] = []
        self._by_other: dict[str, dict[int, Waiting]] = {}
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._by_rank)

    def add(self, waiting: Waiting) -> None:
        """Let it wait here."""
        insort(self._by_rank, (waiting.rank, waiting))
        insort(self._by_age, (waiting.since, waiting.request.id, waiting))
        self._by_other.setdefault(waiting.other, {})[waiting.request.id] = waiting
        self.tokens += waiting.missing

    def remove(self, waiting: Waiting) -> None:
        """Take it out."""
        del self._by_rank[bisect_left(self._by_rank, waiting.rank, key=lambda item: item[0])]
        age = waiting.since, waiting.request.id
        del self._by_age[bisect_left(self._by_age, age, key=lambda item: item[:2])]
        of_other = self._by_other[waiting.other]
        del of_other[waiting.request.id]
        if not of_other:
            del self._by_other[waiting.other]
        self.tokens -= waiting.missing

    def next(self, overdue_since: float) -> Waiting:
        """Who goes next: the oldest, where it came at or before ``overdue_since``; else the lowest rank."""
        oldest = self._by_age[0][2]
        return oldest if oldest.since <= overdue_since else self._by_rank[0][1]

    def oldest(self) -> float:
        """When the oldest came, s; infinity where none waits."""
        return self._by_age[0][0] if self._by_age else float("inf")

    def others(self) -> list[str]:
        """The other replicas of those that wait here."""
        return list(self._by_other)

    def with_other(self, other: str) -> list[Waiting]:
        """Those whose other replica is this one."""
        return list(self._by_other.get(other, {}).values())

    def all(self) -> list[Waiting]:
        """Everyone, the oldest first."""
        return [waiting for _, _, waiting in self._by_age]

    def tokens_ahead(self) -> TokensAhead:
        """What every rank would have to wait for here, as things are now."""
        return TokensAhead(self._by_rank)


class TokensAhead:
    """Missing tokens in front of a rank in one queue, as it was when this was made."""

    def __init__(self, by_rank: list[tuple[Rank, Waiting]]) -> None:
        self._ranks = [rank for rank, _ in by_rank]
        self._sums = [0, *accumulate(waiting.missing for _, waiting in by_rank)]

    def of(self, rank: Rank) -> int:
        """Tokens of all that go before this rank."""
        return self._sums[bisect_left(self._ranks, rank)]
