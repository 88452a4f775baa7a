"""One request, and how a file or a program hands requests over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from equipoise.errors import UserError, require

BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        id: unique among the requests of a router.
        arrival: seconds.
        input_tokens: tokens of the prompt, at least 1.
        output_tokens: tokens of the answer, at least 1. No policy reads it: a router cannot know it.
        blocks: one number per block of the prompt, the last one perhaps partly filled. A number names a block *with
            everything before it*: equal numbers mean equal prompts up to there.
    """

    id: int
    arrival: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]


def read_requests(path: str | Path, limit: int | None = None, block_tokens: int = BLOCK_TOKENS) -> list[Request]:
    """Requests from JSON lines in Mooncake's format.

    A line holds ``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids``, one per block.

    Args:
        limit: read only so many lines; None reads all.
        block_tokens: tokens per block.
    Fails: UserError, with the line's number, for a line that is no such record, an empty prompt or answer, a time
        before the line above's, a number of blocks that does not fit the length, or a block after two different ones.
    Source: Mooncake (kvcache-ai, FAST'25), its trace release. Differs: no.
    """
    path = Path(path)
    require(path.is_file(), f"There is no file {path}; give a file of requests, one JSON object per line.")
    parents: dict[int, int | None] = {}
    requests: list[Request] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and number > limit:
                    break
                requests.append(_request(line, number, requests[-1].arrival if requests else 0.0, block_tokens))
                _check_chain(requests[-1].blocks, parents, number)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file; give JSON lines.") from error
    except UserError as error:
        raise UserError(f"{path}, {error}") from error
    require(bool(requests), f"{path} holds no requests.")
    return requests


def truncated(requests: Iterable[Request], tokens: int, block_tokens: int = BLOCK_TOKENS) -> Iterator[Request]:
    """The requests with prompts cut to ``tokens``, as the published measurements cut theirs."""
    for request in requests:
        kept = min(request.input_tokens, tokens)
        yield replace(request, input_tokens=kept, blocks=request.blocks[: -(-kept // block_tokens)])


def check_sizes(requests: Sequence[Request], most: int) -> None:
    """Fails: UserError for the first request that is longer, with its answer, than a replica can hold."""
    for place, request in enumerate(requests, 1):
        size = request.input_tokens + request.output_tokens
        require(
            size <= most,
            f"Request {place} has {size} tokens with its answer, and a replica holds {most}; cut it with --truncate.",
        )


def check_order(requests: Sequence[Request]) -> None:
    """Fails: UserError where there are no requests, times go backwards, an id comes twice or a prompt is empty."""
    require(len(requests) > 0, "There are no requests to replay.")
    require(len({request.id for request in requests}) == len(requests), "Two requests have the same id.")
    last = 0.0
    for place, request in enumerate(requests, 1):
        require(request.input_tokens > 0 and request.output_tokens > 0, f"Request {place} has no tokens.")
        require(len(request.blocks) > 0, f"Request {place} has no blocks.")
        require(request.arrival >= last, f"Request {place} arrives at {request.arrival} s, before the one above.")
        last = request.arrival


def _request(line: str, number: int, last: float, block_tokens: int) -> Request:
    try:
        record: Any = json.loads(line)
        time, tokens, answer = record["timestamp"], record["input_length"], record["output_length"]
        blocks = tuple(record["hash_ids"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"line {number} is no JSON object with timestamp, input_length, output_length and hash_ids."
        ) from error
    whole = all(type(value) is int for value in (tokens, answer, *blocks))
    require(whole and type(time) in (int, float), f"line {number} holds something else than numbers.")
    require(tokens > 0, f"line {number} has an empty prompt.")
    require(answer > 0, f"line {number} has an empty answer.")
    require(last <= time / 1000 < float("inf"), f"line {number} has time {time} ms, before the line above.")
    expected = -(-tokens // block_tokens)
    require(
        len(blocks) == expected,
        f"line {number} has {len(blocks)} blocks; {tokens} tokens in blocks of {block_tokens} make {expected}.",
    )
    return Request(number - 1, time / 1000, tokens, answer, blocks)


def _check_chain(blocks: Sequence[int], parents: dict[int, int | None], number: int) -> None:
    before = None
    for block in blocks:
        require(
            parents.setdefault(block, before) == before,
            f"line {number} has block {block} after other blocks than an earlier line; hash_ids must name a block with "
            "everything before it.",
        )
        before = block
