"""A tiny engine of the example server: what its tests ask it, and the answers they expect."""

import asyncio
import random
import string
import sys
import threading
from collections.abc import Coroutine
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[2]))  # the examples are not installed

from examples.serving.engine import Engine, EngineSettings, Token, build_model

TINY = EngineSettings(
    width=32, layers=2, heads=2, block_tokens=7, cache_tokens=700, chunk_tokens=11, context_tokens=211, seed=5
)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(1000 * length + seed).choices(range(256), k=length)


@cache
def reference() -> LlamaForCausalLM:
    return build_model(TINY).double()


@torch.inference_mode()
def expect(prompt: list[int], max_tokens: int) -> list[int]:
    """The answer in double precision, with everything computed anew for each token."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        logits = reference()(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].tolist()
        tokens.append(max(string.printable[:95].encode(), key=logits.__getitem__))
    return tokens[len(prompt) :]


def run(coroutine: Coroutine):
    """Its result; what never ends fails."""
    return asyncio.run(asyncio.wait_for(coroutine, timeout=20))


async def stream(engine: Engine, prompt: list[int], max_tokens: int, key: str = "") -> list[Token]:
    return [token async for token in engine.stream(key, prompt, max_tokens)]


def answer(engine: Engine, prompt: list[int], max_tokens: int) -> tuple[list[int], int]:
    """The answer's tokens, and how many prompt tokens were cached."""
    tokens = run(stream(engine, prompt, max_tokens))
    (cached,) = {token.cached_tokens for token in tokens}
    return [token.id for token in tokens], cached


class Watch:
    """Sees every call of the model: how many tokens it computes, and with which keys and values."""

    def __init__(self, engine: Engine) -> None:
        self.computed: list[int] = []
        self.pasts: list = []
        engine.model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, _module, _args, inputs) -> None:
        self.computed.append(inputs["input_ids"].shape[1])
        self.pasts.append(inputs["past_key_values"])


class Gate(Watch):
    """Holds the worker before every call of the model, while the test's event loop goes on."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._here, self._go = threading.Semaphore(0), threading.Semaphore(0)

    def see(self, _module, _args, inputs) -> None:
        super().see(_module, _args, inputs)
        self._here.release()
        assert self._go.acquire(timeout=20)

    async def arrival(self) -> int:
        """Wait until the worker is held; the tokens that it is about to compute."""
        assert await asyncio.to_thread(self._here.acquire, timeout=20)
        return self.computed[-1]

    async def step(self) -> int:
        """One call of the model, up to the next."""
        self._go.release()
        return await self.arrival()

    def open(self) -> None:
        self._go.release(10**6)
