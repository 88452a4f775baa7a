"""What OpenAI's API for chat completions sends and wants."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import JSONResponse

from equipoise.errors import require
from equipoise.serving.ray_errors import NoReplicasError
from equipoise.serving.unbroken import LOST

MODEL = "small"
Token = dict[str, Any]  # one item of a replica's answer


def prompt(body: Any) -> list[int]:
    """The bytes of all messages, each after its role."""
    require(isinstance(body, dict), "The request is no JSON object.")
    messages = body.get("messages")
    require(isinstance(messages, list) and len(messages) > 0, "messages must be a list of at least one.")
    for message in messages:
        whole = isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
        require(whole, "Each message must have a role and a content, both text.")
    require(any(message["content"] for message in messages), "All messages are empty.")
    require(not body.get("temperature"), "This model takes the likeliest token; temperature must be 0.")
    return list("".join(f"{message['role']}\n{message['content']}\n" for message in messages).encode())


def max_tokens(body: dict[str, Any]) -> int:
    """The tokens of the answer."""
    number = body.get("max_tokens", 16)
    require(type(number) is int and number > 0, f"max_tokens must be a whole number of at least 1, not {number!r}.")
    return number


async def events(first: Token, tokens: AsyncIterator[Token], prompt: int) -> AsyncIterator[str]:
    """Server-sent events: a chunk per token, the usage, and the end."""
    yield _event(_chunk(first))
    count = 1
    try:
        async for token in tokens:
            count += 1
            yield _event(_chunk(token))
    except (NoReplicasError, *LOST) as error:
        yield _event({"error": {"message": str(error), "code": 503}})
        return
    yield _event(message("chat.completion.chunk", {"delta": {}}, "length") | usage(first, prompt, count))
    yield "data: [DONE]\n\n"


def message(kind: str, part: dict[str, Any], reason: str | None) -> dict[str, Any]:
    """What chunks and whole answers have in common."""
    choice = {"index": 0, "finish_reason": reason} | part
    return {"object": kind, "model": MODEL, "created": int(time.time()), "choices": [choice]}


def usage(first: Token, prompt: int, count: int) -> dict[str, Any]:
    """Tokens of the prompt, of those found in the cache, and of the answer; and which replica began it."""
    return {
        "system_fingerprint": f"{first['replica']}/{first['pid']}",
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": count,
            "prompt_tokens_details": {"cached_tokens": first["cached"]},
        },
    }


def error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error in OpenAI's form."""
    return JSONResponse({"error": {"message": message, "code": status}}, status, headers)


def _chunk(token: Token) -> dict[str, Any]:
    return message("chat.completion.chunk", {"delta": {"content": chr(token["token"])}}, None) | {
        "system_fingerprint": f"{token['replica']}/{token['pid']}"
    }


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
