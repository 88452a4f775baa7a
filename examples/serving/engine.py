"""The inference engine of a demonstration server: a small language model with a prefix cache, on one CPU thread.

The model is untrained, so its answers mean nothing; what they cost is real. Prompt tokens that are found in the cache
are not computed, a prompt waits for those in front of it, and every running answer slows the others down.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import takewhile

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from equipoise.errors import UserError, require

PRINTABLE = range(32, 127)
Block = Float[Tensor, "states heads tokens head_width"]  # states: keys and values of the first layer, the second, ...


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Size of the model, of its cache and of its steps; replicas with equal settings give equal answers."""

    width: int = 256
    """Width of the model."""
    layers: int = 2
    """Layers of the model."""
    heads: int = 4
    """Attention heads; each has an even share of the width."""
    block_tokens: int = 64
    """Tokens of a block; what is cached and compared is whole blocks."""
    cache_tokens: int = 32_768
    """Tokens of the prefix cache, the least recently used block out first; 0 for none."""
    chunk_tokens: int = 256
    """Prompt tokens computed between two decoding steps."""
    context_tokens: int = 8_192
    """Longest prompt together with its answer."""
    seed: int = 0
    """Seed of the model's weights."""

    def __post_init__(self) -> None:
        """Fails: UserError at the first value that is not allowed."""
        for name, value in asdict(self).items():
            least = {"cache_tokens": 0, "seed": 0, "context_tokens": 2}.get(name, 1)
            require(value >= least, f"{name} must be at least {least}, not {value}.")
        parts = 2 * self.heads
        require(self.width % parts == 0, f"width must be a multiple of {parts}, twice the heads, not {self.width}.")


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer."""

    id: int
    """The byte."""
    cached_tokens: int
    """Prompt tokens found in the cache."""


def build_model(settings: EngineSettings) -> LlamaForCausalLM:
    """A Llama over bytes with random weights, which depend on the settings alone."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=settings.width,
        intermediate_size=4 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.context_tokens,
        # So large that attention is sharp: answers then depend on far-off tokens, and seldom on rounding.
        initializer_range=2 / settings.width**0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        return LlamaForCausalLM(config).eval()


def block_names(prompt: bytes, block_tokens: int) -> list[bytes]:
    """One name per whole block, which stands for the block and all before it."""
    names = [b""]
    for start in range(0, len(prompt) - block_tokens + 1, block_tokens):
        names.append(blake2b(names[-1] + prompt[start : start + block_tokens], digest_size=16).digest())
    return names[1:]


class BlockCache:
    """Up to ``capacity`` blocks of prompts, the least recently used out first.

    A block is kept together with all before it, which count as used later. So a block leaves before those in front of
    it, and what is held of a prompt is always its beginning.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held: OrderedDict[bytes, Block] = OrderedDict()

    def match(self, names: Sequence[bytes]) -> list[Block]:
        """The leading blocks that are held."""
        return [self._held[name] for name in takewhile(self._held.__contains__, names)]

    def keep(self, names: Sequence[bytes], blocks: Sequence[Block]) -> None:
        """Hold a prompt's blocks, as the most recently used."""
        for name, block in reversed(list(zip(names, blocks, strict=True))):
            self._held[name] = block
            self._held.move_to_end(name)
        for _ in range(len(self._held) - self._capacity):
            self._held.popitem(last=False)


@dataclass(eq=False, kw_only=True)
class _Request:
    """A prompt and what has become of it; the worker alone changes it, apart from ``gone``."""

    key: str
    prompt: bytes
    block_names: list[bytes]
    max_tokens: int
    answer: asyncio.Queue[Token | Exception] = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    gone: bool = False
    """Nobody waits for the answer any more."""
    past: DynamicCache = field(default_factory=DynamicCache)
    cached: int = 0
    computed: int = 0
    """Prompt tokens in ``past``, with those cached."""
    answered: int = 0
    latest: int = 0

    def send(self, item: Token | Exception) -> None:
        """Hand over to the consumer's event loop."""
        try:
            self.loop.call_soon_threadsafe(self.answer.put_nowait, item)
        except RuntimeError:  # the event loop is closed
            self.gone = True


class Engine:
    """One worker thread computes a chunk of the oldest unfinished prompt, then a token of every answer, and so on."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.model = build_model(settings)
        self._cache = BlockCache(settings.cache_tokens // settings.block_tokens)
        self._waiting: deque[_Request] = deque()  # their prompts are unfinished
        self._running: list[_Request] = []  # they have their first token
        self._closed = False
        self._changed = threading.Condition()  # guards the four above
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker.start()

    async def stream(self, key: str, prompt: Sequence[int], max_tokens: int) -> AsyncIterator[Token]:
        """The likeliest printable token, again and again; an untrained model stops at ``max_tokens`` only.

        Args:
            key: the caller's name for this request, shown by ``stats``.
            prompt: bytes, 0 to 255.
            max_tokens: tokens of the answer.
        Fails: UserError for a prompt that cannot be answered and when the engine is closed; an error of the model.
        """
        request = self._request(key, prompt, max_tokens)
        with self._changed:
            require(not self._closed, "The engine is closed: start a new one.")
            self._waiting.append(request)
            self._changed.notify()
        try:
            for _ in range(max_tokens):
                item = await request.answer.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            request.gone = True

    def stats(self) -> dict[str, int | list[str]]:
        """``pending_tokens``: prompt tokens still to compute; ``prefilled``: keys of the running answers."""
        with self._changed:
            pending = sum(len(request.prompt) - self._done(request) for request in self._waiting)
            return {"pending_tokens": pending, "prefilled": [request.key for request in self._running]}

    def close(self) -> None:
        """Stop after the present iteration; whoever still waits for an answer gets a UserError."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()

    def _request(self, key: str, prompt: Sequence[int], max_tokens: int) -> _Request:
        try:
            tokens = bytes(list(prompt))
        except (TypeError, ValueError):
            raise UserError("A prompt's tokens must be whole numbers from 0 to 255.") from None
        require(len(tokens) >= 1, "A prompt must have at least one token.")
        require(max_tokens >= 1, f"max_tokens must be at least 1, not {max_tokens}.")
        total, limit = len(tokens) + max_tokens, self.settings.context_tokens
        require(total <= limit, f"A prompt and its answer may have {limit} tokens together, not {total}.")
        names = block_names(tokens, self.settings.block_tokens)
        return _Request(key=key, prompt=tokens, block_names=names, max_tokens=max_tokens)

    def _found(self, request: _Request) -> list[Block]:
        """The cached blocks that it can start from; its last token must be computed, for what follows it."""
        return self._cache.match(request.block_names[: (len(request.prompt) - 1) // self.settings.block_tokens])

    def _done(self, request: _Request) -> int:
        return request.computed or len(self._found(request)) * self.settings.block_tokens

    def _work(self) -> None:
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                while self._wait():
                    self._iterate()
        finally:  # also after an error of our own: nobody may wait for ever
            with self._changed:
                self._closed = True
                for request in [*self._waiting, *self._running]:
                    self._leave(request)
                    request.send(UserError("The engine was closed before the answer was complete."))

    def _wait(self) -> bool:
        """Wait for a request, and drop those that nobody waits for; False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._running)
            for request in [request for request in [*self._waiting, *self._running] if request.gone]:
                self._leave(request)
            return not self._closed

    def _iterate(self) -> None:
        if self._waiting:
            self._attempt(self._prefill, self._waiting[0])
        for request in list(self._running):
            self._attempt(self._decode, request)

    def _attempt(self, step: Callable[[_Request], None], request: _Request) -> None:
        """An error, such as memory that runs out, ends this request alone."""
        try:
            step(request)
        except Exception as error:
            self._leave(request)
            request.send(error)

    def _leave(self, request: _Request) -> None:
        with self._changed:
            (self._running if request in self._running else self._waiting).remove(request)
            request.past.reset()  # a slow consumer still holds the request

    def _prefill(self, request: _Request) -> None:
        """Compute the next chunk of the prompt; the last one gives the first token of the answer."""
        if not request.computed:
            self._start(request)
        end = min(request.computed + self.settings.chunk_tokens, len(request.prompt))
        token = self._forward(request, request.prompt[request.computed : end])
        with self._changed:
            request.computed = end
        if end == len(request.prompt):
            self._keep(request)
            with self._changed:
                self._running.append(self._waiting.popleft())
            self._answer(request, token)

    def _decode(self, request: _Request) -> None:
        self._answer(request, self._forward(request, bytes([request.latest])))

    def _start(self, request: _Request) -> None:
        """Begin with what the cache holds of the prompt."""
        blocks = self._found(request)
        if blocks:
            for layer, states in enumerate(torch.cat(blocks, dim=-2).split(2)):
                request.past.update(states[:1], states[1:], layer)
        with self._changed:
            request.cached = request.computed = len(blocks) * self.settings.block_tokens

    def _keep(self, request: _Request) -> None:
        """Put the prompt's whole blocks into the cache."""
        states = [state for layer in request.past for state in layer if state is not None]
        blocks = self._cache.match(request.block_names)
        for index in range(len(blocks), len(request.block_names)):
            part = slice(index * self.settings.block_tokens, (index + 1) * self.settings.block_tokens)
            blocks.append(torch.cat([state[:, :, part] for state in states]))
        with self._changed:
            self._cache.keep(request.block_names, blocks)

    def _forward(self, request: _Request, tokens: bytes) -> int:
        """The token that follows these."""
        ids = torch.tensor([list(tokens)])
        logits = self.model(input_ids=ids, past_key_values=request.past, logits_to_keep=1).logits
        return PRINTABLE.start + int(logits[0, -1, PRINTABLE.start : PRINTABLE.stop].argmax())

    def _answer(self, request: _Request, token: int) -> None:
        request.answered, request.latest = request.answered + 1, token
        if request.answered == request.max_tokens:
            self._leave(request)
        request.send(Token(token, request.cached))
