"""One replica of the simulator: one prompt at a time in chunks, running requests beside it, one context cache."""

from __future__ import annotations

import heapq
from collections import deque
from typing import Literal, NamedTuple

from equipoise.serving.costs import Costs
from equipoise.serving.prefix_cache import PrefixCache
from equipoise.serving.request import Request


class Answer(NamedTuple):
    """What a replica did: gave a request's first token or its last, with the prompt tokens it found in its cache."""

    kind: Literal["prefilled", "finished"]
    request: Request
    hit_tokens: int


class SimulatedReplica:
    """Computes prompts in the order in which they came, and decodes beside it.

    A step computes one chunk of the prompt and the next token of every running request, and takes the time of both;
    without a prompt it takes as long as reading the weights and all contexts. Between two events the speed of both is
    constant. A prompt starts when the tokens of all running requests leave room for it. INFERRED throughout: continuous
    batching with chunked prefill, as vLLM and SGLang do it.
    """

    def __init__(self, costs: Costs, now: float) -> None:
        self._costs = costs
        self._now = now
        self._cache = PrefixCache(costs.cache_tokens // costs.block_tokens)
        self._waiting: deque[Request] = deque()
        self._prompt: tuple[Request, int] | None = None
        self._work = 0.0  # of the prompt, s, as if alone
        self._running: list[tuple[float, int, Request, int]] = []  # the count of decoded tokens at which each ends
        self._decoded = 0.0  # tokens that each running request would have, had it run from the start
        self._context = self._resident = 0
        self._prefill_ends = False  # whether that is the next event

    def accept(self, request: Request, now: float) -> None:
        """A request arrives."""
        self._advance(now)
        self._waiting.append(request)
        self._start()

    def pending_tokens(self, now: float) -> int:
        """Prompt tokens that it was sent and has to compute, as a server would report them."""
        self._advance(now)
        waiting = sum(request.input_tokens - self._hit(request) for request in self._waiting)
        return waiting + round(self._work / self._costs.prefill_seconds) if self._prompt else waiting

    def next_time(self) -> float:
        """When something happens next, s; infinity if nothing runs."""
        step = self._step_seconds()
        prefill = self._now + self._work * step / self._alone_seconds() if self._prompt else float("inf")
        decode = self._now + (self._running[0][0] - self._decoded) * step if self._running else float("inf")
        self._prefill_ends = prefill <= decode
        return max(min(prefill, decode), self._now)

    def happen(self, now: float) -> Answer:
        """What happens at ``next_time()``, which must have been asked since the last change."""
        prefill_ends = self._prefill_ends
        self._advance(now)
        answer = self._end_prefill() if prefill_ends else self._end_decode()
        self._start()
        return answer

    def _advance(self, now: float) -> None:
        step = self._step_seconds()
        if self._prompt:
            self._work -= (now - self._now) * self._alone_seconds() / step
        if self._running:
            self._decoded += (now - self._now) / step
        self._now = now

    def _alone_seconds(self) -> float:
        return self._costs.chunk_tokens * self._costs.prefill_seconds

    def _step_seconds(self) -> float:
        costs = self._costs
        reading = self._context * costs.context_seconds
        if self._prompt:
            return self._alone_seconds() + len(self._running) * costs.prefill_seconds + reading
        return costs.decode_seconds + reading

    def _start(self) -> None:
        """Begin the next prompt if none is computed and the device has room."""
        if self._prompt or not self._waiting:
            return
        request = self._waiting[0]
        size = request.input_tokens + request.output_tokens
        if self._resident + size > self._costs.kv_tokens:
            return
        self._waiting.popleft()
        self._resident += size
        costs = self._costs
        hit = self._hit(request)
        self._prompt = request, hit
        self._work = (request.input_tokens - hit) * costs.prefill_seconds + hit * costs.hit_seconds

    def _hit(self, request: Request) -> int:
        return min(self._cache.match(request.blocks) * self._costs.block_tokens, request.input_tokens - 1)

    def _end_prefill(self) -> Answer:
        assert self._prompt
        request, hit = self._prompt
        self._prompt = None
        self._cache.use(request.blocks)
        # The answer's first token came with the prompt; one of a single token ends at once, as the next event.
        ends = self._decoded + request.output_tokens - 1
        heapq.heappush(self._running, (ends, request.id, request, hit))
        self._context += self._mean_context(request)
        return Answer("prefilled", request, hit)

    def _end_decode(self) -> Answer:
        ends, _, request, hit = heapq.heappop(self._running)
        self._decoded = ends
        self._context -= self._mean_context(request)
        self._resident -= request.input_tokens + request.output_tokens
        return Answer("finished", request, hit)

    @staticmethod
    def _mean_context(request: Request) -> int:
        return request.input_tokens + request.output_tokens // 2
