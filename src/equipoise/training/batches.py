"""Tokens to batches: what a step trains on is a pure function of the seed and the step, so it needs no saved state."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt, UInt8
from torch import Tensor

from equipoise.errors import UserError
from equipoise.training.documents import Document, digest
from equipoise.training.tokenizer import SEPARATOR, Tokenizer
from equipoise.training.waiting import bar

MOST_DOMAINS = 256  # a token's domain is one byte
Batch = tuple[Int64[Tensor, "B S1"], UInt8[Tensor, "B S1"]]  # tokens, and the domain of each; S1 is S + 1


@dataclass(frozen=True)
class TokenSet:
    """A text as one row of M tokens.

    Attributes:
        token_M: the ids; a separator ends each document.
        domain_M: each token's place in ``domains``.
        domains: names, of which some may have no token here.
    """

    token_M: UInt[np.ndarray, " M"]
    domain_M: UInt8[np.ndarray, " M"]
    domains: tuple[str, ...]

    @classmethod
    def build(cls, documents: Sequence[Document], tokenizer: Tokenizer, domains: tuple[str, ...]) -> TokenSet:
        """Encode documents, in the order of a hash of their text.

        Args:
            domains: those of the whole corpus, so that training and validation number them alike.

        Fails: UserError for more than ``MOST_DOMAINS`` of them.
        """
        assert documents, "nothing to encode"
        if len(domains) > MOST_DOMAINS:
            raise UserError(f"The data has {len(domains)} domains, but {MOST_DOMAINS} are the most; merge some.")
        tokens, sizes, places = [], [], []
        ordered = sorted(documents, key=lambda document: (digest(document.text), document.domain))
        with bar() as progress:
            for document in progress.track(ordered, description="Encoding the text"):
                ids = tokenizer.encode(document.text)
                tokens += [ids, np.array([SEPARATOR], ids.dtype)]
                sizes.append(len(ids) + 1)
                places.append(domains.index(document.domain))
        return cls(np.concatenate(tokens), np.repeat(np.array(places, np.uint8), sizes), domains)


class Batches:
    """Batches of windows of S + 1 tokens: S inputs, and the same moved on by one as targets.

    Window w starts at token w * S, so every token but the first is a target once in an epoch. Each epoch visits every
    window once, in an order of its own; a batch may run from one epoch into the next.

    Args:
        batch_size: sequences of the global batch, over all micro-batches and ranks.
        seq_len: S.

    Fails: UserError where the text is shorter than one sequence.
    """

    def __init__(self, tokens: TokenSet, batch_size: int, seq_len: int, seed: int):
        _check_length(tokens, seq_len)
        self.windows = (len(tokens.token_M) - 1) // seq_len
        self._tokens, self._batch_size, self._seq_len = tokens, batch_size, seq_len
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: _permutation(seed, epoch, self.windows))

    def batch(self, step: int, micro: int = 0, micros: int = 1, rank: int = 0, world: int = 1) -> Batch:
        """The sequences of one step that one rank computes in one micro-batch.

        Returns: token_BS1 and domain_BS1 [B, S + 1], with B = batch_size / (micros * world).
        Fails: UserError where the batch does not divide so.
        """
        mine = share(self._batch_size, micro, micros, rank, world)
        epoch_B, place_B = np.divmod(step * self._batch_size + np.arange(mine.start, mine.stop), self.windows)
        window_B = np.array([self._order(int(epoch))[place] for epoch, place in zip(epoch_B, place_B)])
        return gather(self._tokens.token_M, self._tokens.domain_M, window_B * self._seq_len, self._seq_len)


def share(batch_size: int, micro: int, micros: int, rank: int, world: int) -> slice:
    """Which sequences of the global batch one rank computes in one micro-batch; together they are all, each once.

    Fails: UserError where the global batch does not divide so.
    """
    assert 0 <= micro < micros
    assert 0 <= rank < world
    size, rest = divmod(batch_size, micros * world)
    if rest or size < 1:
        raise UserError(
            f"The global batch of {batch_size} sequences does not divide by {micros} micro-batches on {world} ranks; "
            f"choose a multiple of {micros * world}."
        )
    start = (micro * world + rank) * size
    return slice(start, start + size)


def validation_batches(tokens: TokenSet, batch_size: int, seq_len: int, max_tokens: int) -> list[Batch]:
    """The same batches on every call, with the same number of windows from each domain as far as it has them.

    Each domain's windows are spread evenly over its text and hold no other domain's tokens, except where a domain is
    shorter than one window. The last batch may be smaller.

    Args:
        max_tokens: targets in all; every domain gives one window even where that is more.

    Fails: UserError where the text is shorter than one sequence.
    """
    _check_length(tokens, seq_len)
    order_M = np.argsort(tokens.domain_M, kind="stable")
    token_M, domain_M = tokens.token_M[order_M], tokens.domain_M[order_M]
    first = np.flatnonzero(np.diff(domain_M, prepend=domain_M[0] ^ 1))
    quota = max(1, max_tokens // (seq_len * len(first)))
    starts = []
    for start, end in zip(first, [*first[1:], len(token_M)]):
        windows = max(1, (end - start - 1) // seq_len)
        chosen = np.arange(min(quota, windows)) * windows // min(quota, windows)
        starts.append(start + chosen * seq_len)
    start_N = np.concatenate(starts).clip(max=len(token_M) - seq_len - 1)
    rows = (start_N[place : place + batch_size] for place in range(0, len(start_N), batch_size))
    return [gather(token_M, domain_M, start_B, seq_len) for start_B in rows]


def _check_length(tokens: TokenSet, seq_len: int) -> None:
    length = len(tokens.token_M)
    if length <= seq_len:
        raise UserError(
            f"The text has {length} tokens, but one sequence of seq_len {seq_len} takes {seq_len + 1}; "
            "give more text or a smaller seq_len."
        )


def _permutation(seed: int, epoch: int, windows: int) -> Int64[np.ndarray, " W"]:
    return np.random.default_rng([seed, epoch]).permutation(windows)


def gather(
    token_M: UInt[np.ndarray, " M"], domain_M: UInt8[np.ndarray, " M"], start_B: Int64[np.ndarray, " B"], seq_len: int
) -> Batch:
    """The windows of S + 1 tokens that start there."""
    index = start_B[:, None] + np.arange(seq_len + 1)
    return torch.from_numpy(token_M[index].astype(np.int64)), torch.from_numpy(domain_M[index])
