"""Send requests at their times from several client processes, and keep what came back."""

import asyncio
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from hashlib import blake2b

import aiohttp

from equipoise.serving import Request

RETRY_SECONDS = 0.5  # after 503, as its header asks at most


@dataclass
class Answer:
    """What a client saw of one request; times in seconds on the clock of ``time.time``.

    Attributes:
        due: when it was to be sent.
        first: when the first token came.
        last: when the answer was complete; 0 if it never was.
        replicas: those that gave tokens, in order, each as ``name/process``.
        refused: how often it was answered with 503 before.
        ends: how often the answer was said to be complete.
        error: what went wrong, if anything.
    """

    id: int
    due: float
    first: float = 0.0
    last: float = 0.0
    text: str = ""
    replicas: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    refused: int = 0
    ends: int = 0
    error: str = ""


def prompt_text(request: Request, block_bytes: int, input_tokens: int) -> str:
    """A text that begins like another as far as their blocks are equal: so many bytes per block."""
    words = (blake2b(str(block).encode(), digest_size=16).hexdigest() for block in request.blocks)
    return "".join((word * (block_bytes // len(word) + 1))[:block_bytes] for word in words)[:input_tokens]


def send(
    url: str,
    calls: Sequence[tuple[float, str, int]],
    processes: int = 3,
    on_progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Send every call at its time, whatever became of the others; answers in the order of the calls.

    Args:
        calls: seconds from now, text, tokens of the answer.
    """
    start = time.time() + 1.0  # when all processes run
    numbered = [(id, start + at, text, tokens) for id, (at, text, tokens) in enumerate(calls)]
    answers: list[Answer] = []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        parts = [pool.submit(_send_part, url, numbered[part::processes]) for part in range(processes)]
        for part in as_completed(parts):
            answers += part.result()
            if on_progress:
                on_progress(len(answers))
    return sorted(answers, key=lambda answer: answer.id)


def _send_part(url: str, calls: list[tuple[int, float, str, int]]) -> list[Answer]:
    async def all_calls() -> list[Answer]:
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            return await asyncio.gather(*(_send_one(session, url, *call) for call in calls))

    return asyncio.run(all_calls())


async def _send_one(session: aiohttp.ClientSession, url: str, id: int, due: float, text: str, tokens: int) -> Answer:
    answer = Answer(id, due)
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": True}
    await asyncio.sleep(max(due - time.time(), 0.0))
    while True:
        try:
            async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                if response.status == 503:
                    answer.refused += 1
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                if response.status != 200:
                    answer.error = f"{response.status}: {await response.text()}"
                    return answer
                await _read(response, answer)
        except (TimeoutError, aiohttp.ClientError) as error:
            answer.error = repr(error)
        return answer


async def _read(response: aiohttp.ClientResponse, answer: Answer) -> None:
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            answer.last = time.time()
            answer.ends += 1
            continue
        event = json.loads(line[len("data: ") :])
        if "error" in event:
            answer.error = event["error"]["message"]
            continue
        content = event["choices"][0]["delta"].get("content")
        if content is not None:
            answer.first = answer.first or time.time()
            answer.text += content
            if event["system_fingerprint"] not in answer.replicas[-1:]:
                answer.replicas.append(event["system_fingerprint"])
        else:
            usage = event["usage"]
            answer.prompt_tokens = usage["prompt_tokens"]
            answer.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
