"""The text of a run: read, split, encoded and put into batches, as the configuration says."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int64, UInt8
from torch import Tensor

from equipoise.config import DataConfig, OptimizerConfig
from equipoise.training import corpus, tokenizer
from equipoise.training.batches import Batches, TokenSet, validation_batches
from equipoise.training.stream import StreamBatches, TextStream
from equipoise.training.tokenizer import Tokenizer

SAMPLE = 10_000_000  # characters of a stream that a tokenizer learns from


@dataclass(frozen=True)
class Text:
    """What a run trains on and is validated with.

    Attributes:
        train: batches by step.
        validation: the same batches every time.
        domains: their names, in the order of the batches' domain numbers.
        tokens: training and validation tokens by domain; empty for a stream, whose length nobody knows.
        digest: of the tokens and their domains, those of validation alone for a stream.
    """

    tokenizer: Tokenizer
    train: Batches | StreamBatches
    validation: list[tuple[Int64[Tensor, "_B S1"], UInt8[Tensor, "_B S1"]]]  # the last batch may be smaller
    domains: tuple[str, ...]
    tokens: dict[str, dict[str, int]]
    digest: str

    def state(self) -> dict[str, Any]:
        """The position, where it does not follow from the step."""
        return self.train.state_dict() if isinstance(self.train, StreamBatches) else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the position again."""
        if isinstance(self.train, StreamBatches):
            self.train.load_state_dict(state)


def read_text(data: DataConfig, optimizer: OptimizerConfig, seed: int) -> Text:
    """Read the text of a run.

    Fails: UserError as in ``corpus.load``, ``tokenizer.build``, ``TextStream`` and ``Batches``.
    """
    if data.source.startswith("hf:"):
        return _stream(data, optimizer)
    documents = corpus.load(data.source)
    domains = tuple(sorted({document.domain for document in documents}))
    train, validation = corpus.split(documents)
    encoder = tokenizer.build(data.tokenizer, train)
    train_set, validation_set = (TokenSet.build(part, encoder, domains) for part in (train, validation))
    return Text(
        encoder,
        Batches(train_set, optimizer.batch_size, data.seq_len, seed),
        validation_batches(validation_set, optimizer.batch_size, data.seq_len, data.validation_tokens),
        domains,
        {
            name: {"train_tokens": _count(train_set, index), "validation_tokens": _count(validation_set, index)}
            for index, name in enumerate(domains)
        },
        _digest(train_set, validation_set),
    )


def _stream(data: DataConfig, optimizer: OptimizerConfig) -> Text:
    """A stream: its order is its own, and nobody knows its length."""
    stream = TextStream(data.source)
    validation = stream.validation(4 * data.validation_tokens)  # enough characters, whatever the tokenizer
    encoder = tokenizer.build(data.tokenizer, stream.sample(SAMPLE) if data.tokenizer != "bytes" else [])
    domains = tuple(stream.domains)
    validation_set = TokenSet.build(validation, encoder, domains)
    return Text(
        encoder,
        StreamBatches(stream, encoder, optimizer.batch_size, data.seq_len),
        validation_batches(validation_set, optimizer.batch_size, data.seq_len, data.validation_tokens),
        domains,
        {},
        _digest(validation_set),
    )


def _digest(*parts: TokenSet) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.token_M.tobytes())
        digest.update(part.domain_M.tobytes())
    return digest.hexdigest()


def _count(tokens: TokenSet, domain: int) -> int:
    return int((tokens.domain_M == domain).sum())
