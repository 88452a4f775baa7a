"""The prompt of an API call, as a policy sees it: how many tokens, and a number for each block."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from equipoise.errors import UserError, require
from equipoise.serving.request import BLOCK_TOKENS

TOKEN_BYTES = 4  # of one token number
MESSAGE_PARTS = ("role", "name", "tool_call_id", "content", "tool_calls")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a policy must know of a prompt; `tokens` and `blocks` are `input_tokens` and `blocks` of a Request.

    One that holds nothing to compare has no blocks.
    """

    tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PromptReader:
    """Reads what OpenAI's API calls a prompt, without the model's tokenizer.

    Equal beginnings of text give equal beginnings of tokens, so blocks are cut from the text's UTF-8 bytes, so many
    per token; a prompt of token numbers is cut exactly. Equal numbers mean prompts that are equal up to there.

    Attributes:
        block_tokens: tokens per block.
        bytes_per_token: of the model's tokenizer, on average.
    """

    block_tokens: int = BLOCK_TOKENS
    bytes_per_token: float = 4.0

    def __post_init__(self) -> None:
        """Fails: UserError for a value that is not positive."""
        require(self.block_tokens > 0, f"block_tokens must be above 0, not {self.block_tokens}.")
        require(self.bytes_per_token > 0, f"bytes_per_token must be above 0, not {self.bytes_per_token}.")

    def read(self, arguments: Sequence[Any]) -> Prompt:
        """The prompt of a call: of the first argument with messages, a prompt or input, as a mapping or an object.

        Fails: UserError where no argument has any of them, or in another form than OpenAI's.
        """
        for argument in arguments:
            for name in ("messages", "prompt", "input"):
                value = field(argument, name)
                if value is not None:
                    return self._cut(_rendered(value, field(argument, "tools")) if name == "messages" else value)
        raise UserError("The call has neither messages nor a prompt, so it cannot be routed by its beginning.")

    def _cut(self, prompt: Any) -> Prompt:
        data, bytes_per_token = _encoded(prompt)
        if not data:
            return Prompt(1, ())
        bytes_per_token = bytes_per_token or self.bytes_per_token
        step = max(round(self.block_tokens * bytes_per_token), 1)
        blocks, digest = [], b""
        for start in range(0, len(data), step):
            digest = blake2b(digest + data[start : start + step], digest_size=8).digest()
            blocks.append(int.from_bytes(digest))
        return Prompt(math.ceil(len(data) / bytes_per_token), tuple(blocks))


def field(value: Any, name: str) -> Any:
    """A field of a mapping or an object; None where it has none."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _encoded(prompt: Any) -> tuple[bytes, int | None]:
    """The prompt's bytes, and how many there are per token if that is known. Several prompts become one."""
    if isinstance(prompt, bytes):
        return prompt, None
    if isinstance(prompt, str):
        return prompt.encode("utf-8", "surrogatepass"), None
    require(isinstance(prompt, Sequence), f"A prompt must be text or token numbers, not {type(prompt).__name__}.")
    if all(type(token) is int for token in prompt):
        require(all(0 <= token < 2 ** (8 * TOKEN_BYTES) for token in prompt), "A token number must be from 0 to 2^32.")
        return b"".join(token.to_bytes(TOKEN_BYTES) for token in prompt), TOKEN_BYTES
    parts = [_encoded(part) for part in prompt]
    return b"".join(data for data, _ in parts), parts[0][1]


def _rendered(messages: Any, tools: Any) -> str:
    """Messages as one text, in the order in which chat templates write them: tools stand before everything."""
    require(isinstance(messages, Sequence), f"messages must be a list, not {type(messages).__name__}.")
    text = [] if tools is None else [_text(tools)]
    for message in messages:
        parts = {name: field(message, name) for name in MESSAGE_PARTS}
        text += [f"\n{_text(part)}" for part in parts.values() if part is not None]
    return "".join(text)


def _text(content: Any) -> str:
    """Text as it is; other parts, such as pictures or calls of tools, as JSON, so that equal ones stay equal."""
    if isinstance(content, str):
        return content
    try:
        return json.dumps(content, default=str, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError("A message or tool is no JSON value, so it cannot be compared with others.") from error
