"""Generated requests of agents and conversations, which start alike; fixed before the first policy was replayed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from equipoise.errors import require
from equipoise.serving.request import BLOCK_TOKENS, Request

DRAWN_TOGETHER = 4096  # numbers drawn at a time: numpy draws one as slowly as many


@dataclass(frozen=True, kw_only=True)
class SkewedWorkload:
    """Sessions that begin with one of few shared prefixes, the popular ones far more often than the others.

    Shaped after what DualMap (arXiv 2602.06502) reports of Mooncake's tool-and-agent trace: prompts of 8,596 and
    answers of 182 tokens on average, prefixes of 2, 6 and 13 blocks for 45.2, 14.9 and 37.8 % of the requests, about
    59 % of all prompt tokens seen before. INFERRED: Zipf's law, exponential gaps and lengths, and the share of requests
    that continue a session.
    """

    num_requests: int = 10_000
    """Requests."""
    rate: float = 4.0
    """Requests per second on average; gaps are exponential."""
    num_prefixes: int = 128
    """Different shared prefixes."""
    zipf: float = 1.0
    """Popularity of the prefix of rank r is r to the power of minus this."""
    prefix_blocks: tuple[int, ...] = (2, 6, 13)
    """Lengths of prefixes, blocks."""
    prefix_shares: tuple[float, ...] = (0.46, 0.15, 0.39)
    """How many of the prefixes have which length."""
    continued: float = 0.35
    """Share of the requests that continue a running session: its prompt so far, and a new turn."""
    sessions: int = 64
    """Sessions that may be continued; the longest idle one is forgotten first."""
    turn_tokens: int = 3300
    """Mean tokens that a turn adds to the prompt; exponential."""
    output_tokens: int = 182
    """Mean tokens of an answer; exponential."""
    most_tokens: int = 20_480
    """Longest prompt; a session that would exceed it starts anew."""
    seed: int = 0
    """Seed of all draws."""

    def __post_init__(self) -> None:
        """Fails: UserError for a value that is not allowed."""
        for name in ("num_requests", "rate", "num_prefixes", "sessions", "turn_tokens", "output_tokens"):
            require(getattr(self, name) > 0, f"{name} must be above 0, not {getattr(self, name)}.")
        require(0 <= self.continued < 1, f"continued must be from 0 to below 1, not {self.continued}.")
        longest = max(self.prefix_blocks) * BLOCK_TOKENS
        require(self.most_tokens > longest, f"most_tokens must be above the longest prefix, {longest} tokens.")

    def requests(self) -> Iterator[Request]:
        """The requests, by arrival; equal settings give equal requests."""
        draws = _Draws(self)
        blocks = _Numbers()
        prefixes = [blocks.new(int(length)) for length in draws.prefix_lengths()]
        sessions: list[tuple[tuple[int, ...], int]] = []  # whole blocks so far, tokens so far; least recent first
        now = 0.0
        for id in range(self.num_requests):
            now += draws.gap()
            turn = draws.turn()
            place = draws.session(len(sessions))
            if place is not None and sessions[place][1] + turn <= self.most_tokens:
                history, tokens = sessions.pop(place)
            else:
                history = prefixes[draws.prefix()]
                tokens = len(history) * BLOCK_TOKENS
            tokens = min(tokens + turn, self.most_tokens)
            prompt = history + blocks.new(-(-tokens // BLOCK_TOKENS) - len(history))
            sessions.append((prompt[: tokens // BLOCK_TOKENS], tokens))
            del sessions[: -self.sessions]
            yield Request(id, now, tokens, draws.answer(), prompt)


class _Numbers:
    """Numbers for blocks, each given once."""

    def __init__(self) -> None:
        self._next = 0

    def new(self, count: int) -> tuple[int, ...]:
        first, self._next = self._next, self._next + count
        return tuple(range(first, self._next))


class _Draws:
    """The workload's random numbers, drawn in blocks."""

    def __init__(self, workload: SkewedWorkload) -> None:
        self._workload = workload
        self._random = np.random.default_rng(workload.seed)
        ranks = np.arange(1, workload.num_prefixes + 1, dtype=np.float64)
        self._popularity = np.cumsum(ranks**-workload.zipf)
        self._popularity /= self._popularity[-1]
        self._exponential, self._uniform = self._blocks("exponential"), self._blocks("random")

    def _blocks(self, kind: str) -> Iterator[float]:
        while True:
            yield from getattr(self._random, kind)(size=DRAWN_TOGETHER).tolist()

    def prefix_lengths(self) -> list[int]:
        shares = np.array(self._workload.prefix_shares) / sum(self._workload.prefix_shares)
        return self._random.choice(self._workload.prefix_blocks, self._workload.num_prefixes, p=shares).tolist()

    def gap(self) -> float:
        return next(self._exponential) / self._workload.rate

    def turn(self) -> int:
        return 1 + int(next(self._exponential) * self._workload.turn_tokens)

    def answer(self) -> int:
        return 1 + int(next(self._exponential) * self._workload.output_tokens)

    def prefix(self) -> int:
        return int(np.searchsorted(self._popularity, next(self._uniform)))

    def session(self, count: int) -> int | None:
        """Which session goes on; None starts one."""
        goes_on = next(self._uniform) < self._workload.continued
        return int(next(self._uniform) * count) if goes_on and count else None
