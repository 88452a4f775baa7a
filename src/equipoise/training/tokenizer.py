"""Text to token ids and back: bytes, or byte-level byte-pair encoding. Id 0 separates documents in both."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsInt

import numpy as np
from jaxtyping import UInt

from equipoise.errors import UserError
from equipoise.training import cache
from equipoise.training.documents import Document, digest
from equipoise.training.waiting import bar

SEPARATOR = 0
SEPARATOR_TEXT = "<|end|>"  # what a byte-pair vocabulary calls id 0; the same words in a text are encoded as words
FILE = "tokenizer.json"


class ByteTokenizer:
    """The bytes of UTF-8 are the ids: 256 of them, and nothing to train."""

    name = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> UInt[np.ndarray, " M"]:
        """Ids as uint16. Fails: UserError where the text holds the character NUL, which separates documents."""
        if "\0" in text:
            raise UserError("The text holds the character NUL, which separates documents; remove it.")
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text; what is not UTF-8 becomes U+FFFD."""
        return bytes(int(id) for id in ids).decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        cache.write(folder / FILE, json.dumps({"model": {"type": "bytes"}}))


class BPETokenizer:
    """Byte-level byte-pair encoding by the `tokenizers` library; every text has an encoding and comes back exactly.

    Args:
        vocab: every token's id, 0 to the number of tokens; id 0 is the separator, and every byte is a token.
        merges: the pairs of tokens that are joined, first things first.

    Fails: UserError where `tokenizers` is not installed.
    """

    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]]):
        library = _library()
        self._tokenizer = _byte_level(library, library.models.BPE(vocab, list(merges)))
        self._tokenizer.add_special_tokens([SEPARATOR_TEXT])
        self._tokenizer.encode_special_tokens = True  # a text that says "<|end|>" does not end
        self.vocab_size = len(vocab)
        self.name = f"bpe:{self.vocab_size}"

    @classmethod
    def train(cls, documents: Sequence[Document], vocab_size: int) -> BPETokenizer:
        """Learn the merges of the documents' text; the vocabulary is smaller where the text has no more pairs."""
        library = _library()
        tokenizer = _byte_level(library, library.models.BPE())
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[SEPARATOR_TEXT],
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        with bar() as progress:
            shown = progress.track(documents, description="Training the tokenizer")
            tokenizer.train_from_iterator((document.text for document in shown), trainer)
        model = json.loads(tokenizer.to_str())["model"]
        return cls(model["vocab"], [(left, right) for left, right in model["merges"]])

    def encode(self, text: str) -> UInt[np.ndarray, " M"]:
        """Ids, uint16 where the vocabulary allows, else uint32."""
        ids = self._tokenizer.encode(text).ids
        return np.array(ids, np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text; what is not UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, which the `tokenizers` library reads too."""
        cache.write(folder / FILE, self._tokenizer.to_str())


Tokenizer = ByteTokenizer | BPETokenizer


def build(name: str, documents: Sequence[Document], folder: Path | None = None) -> Tokenizer:
    """The tokenizer of a name.

    Args:
        name: `bytes`, or `bpe:SIZE` with a vocabulary of SIZE ids, 257 at least.
        documents: what byte-pair encoding learns from.
        folder: where it is kept for the next time, by its size and its documents; None for the user's cache.

    Fails: UserError for another name, or where `tokenizers` is not installed.
    """
    if name == "bytes":
        return ByteTokenizer()
    size = re.fullmatch(r"bpe:(\d{1,7})", name)
    if not size or int(size[1]) <= 256:
        raise UserError(f"There is no tokenizer {name!r}; name 'bytes', or 'bpe:4096' with any size above 256.")
    key = digest("".join(digest(document.text) for document in documents))[:16]
    kept = (folder or cache.folder()) / f"bpe-{size[1]}-{key}"
    try:
        return load(kept)
    except UserError:  # absent or damaged: it is trained anew
        tokenizer = BPETokenizer.train(documents, int(size[1]))
        tokenizer.save(kept)
        return tokenizer


def load(folder: Path) -> Tokenizer:
    """Read what `save` wrote.

    Nothing but the vocabulary and the merges is taken from the file, and both are checked.

    Fails: UserError where the file is absent, damaged or another tokenizer's, or `tokenizers` is not installed.
    """
    path = folder / FILE
    model = _model(path)
    if model.get("type") == "bytes":
        return ByteTokenizer()
    if not model or not _consistent(model, set(_library().pre_tokenizers.ByteLevel.alphabet())):
        raise UserError(f"{path} is absent, damaged or not a tokenizer of ours; name a folder that a training wrote.")
    return BPETokenizer(model["vocab"], [(left, right) for left, right in model["merges"]])


def _model(path: Path) -> dict[str, Any]:
    """What the file says of its model; empty where there is no such thing to read."""
    try:
        model = json.loads(path.read_text("utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return model if isinstance(model, dict) else {}


def _consistent(model: dict[str, Any], alphabet: set[str]) -> bool:
    """Whether ids run from 0, id 0 is the separator, every byte has a token, and merges make tokens of tokens."""
    try:
        vocab = model["vocab"]
        return (
            all(type(id) is int for id in vocab.values())
            and sorted(vocab.values()) == list(range(len(vocab)))
            and vocab[SEPARATOR_TEXT] == SEPARATOR
            and alphabet <= vocab.keys()
            and all({left, right, left + right} <= vocab.keys() for left, right in model["merges"])
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _byte_level(library: ModuleType, model: object):
    """A tokenizer of the library that takes bytes for characters, so that no text is unknown."""
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def _library() -> ModuleType:
    """The `tokenizers` package."""
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise UserError("Byte-pair encoding needs the package tokenizers: pip install 'equipoise[hf]'.") from error
    return tokenizers
