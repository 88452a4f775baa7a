"""Text that is too much to hold: a data set of the Hugging Face hub, or a folder, read from front to back."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from equipoise.errors import UserError
from equipoise.training.batches import MOST_DOMAINS, Batch, gather, share
from equipoise.training.documents import Document, digest
from equipoise.training.tokenizer import SEPARATOR, Tokenizer
from equipoise.training.waiting import bar

HELD_OUT = 50  # one document in so many is for validation
DOMAIN_COLUMNS = ("domain", "source")
OTHER = "other"  # the domain of all domains after the first 255


class TextStream:
    """The documents of a data set, in its own order; it should be shuffled already.

    A document's domain is its column `domain` or `source`, else the data set's name. The character NUL is removed.

    Args:
        data: `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:SPLIT:COLUMN`. NAME is a data set of the hub (`owner/name`, or
            `owner/name/configuration`) or a folder of .jsonl, .parquet or .txt files. Where they are not named, the
            split is `train` and the column of the text is `text`.

    Attributes:
        data: as given.
        domains: the names met so far; it grows.

    Fails: UserError where there is no such data set, split or column, or `datasets` is not installed.
    """

    def __init__(self, data: str):
        name, split, self._column = _parse(data)
        dataset, row = _open(name, split)
        if not isinstance(row.get(self._column), str):
            texts = ", ".join(key for key, value in row.items() if isinstance(value, str)) or "none"
            raise UserError(
                f"The data set {name} has no text in a column {self._column!r} (its columns of text: {texts}); "
                f"name one as hf:{name}:{split}:COLUMN."
            )
        self.data, self.domains = data, []
        self._name = Path(name).name if Path(name).is_dir() else name
        self._domain_column = next((key for key in DOMAIN_COLUMNS if isinstance(row.get(key), str)), None)
        self._dataset = dataset.select_columns([key for key in (self._column, self._domain_column) if key])

    def validation(self, characters: int) -> list[Document]:
        """The first held-out documents of so many characters, or all; `StreamBatches` never gives them.

        Fails: UserError where no document is held out.
        """
        documents = self._first(characters, held=True)
        if not documents:
            raise UserError(
                f"The data {self.data!r} is too small to validate with: one document in {HELD_OUT} is held out, "
                "and here there is none; name a larger data set, or the files without hf: to hold out a tenth."
            )
        return documents

    def sample(self, characters: int) -> list[Document]:
        """The first documents of so many characters, or all, that are not held out: for a tokenizer to learn from."""
        return self._first(characters, held=False)

    def dataset(self) -> Any:
        """A `datasets.IterableDataset` that stands at the start and has a position of its own."""
        return copy.deepcopy(self._dataset)

    def read(self, dataset: Any) -> Iterator[Document]:
        """The documents from the data set's position to its end, without blank ones."""
        for row in dataset:
            text = (row[self._column] or "").replace("\0", "")
            if text.strip():
                yield Document(self._domain(row), self._name, text)

    def _first(self, characters: int, held: bool) -> list[Document]:
        documents, size = [], 0
        with bar() as progress:
            task = progress.add_task(f"Reading {self._name}", total=characters)
            for document in self.read(self.dataset()):
                if held_out(document) == held:
                    documents.append(document)
                    size += len(document.text)
                    progress.update(task, completed=size)
                if size >= characters:
                    break
        return documents

    def _domain(self, row: dict[str, Any]) -> str:
        """The row's domain, noted in ``domains``; a column of many values, such as addresses, ends in ``OTHER``."""
        name = (self._domain_column and row[self._domain_column]) or self._name
        if name not in self.domains and len(self.domains) >= MOST_DOMAINS - 1:
            name = OTHER
        if name not in self.domains:
            self.domains.append(name)
        return name


class StreamBatches:
    """Batches of windows of S + 1 tokens from a stream, in its order, and again from its start when it ends.

    Like `Batches`, but steps must be asked for one after the other, and the position must be saved. Every rank reads
    the whole stream and keeps its share of each global batch.

    Args:
        batch_size: sequences of the global batch, over all micro-batches and ranks.
        seq_len: S.

    Attributes:
        documents: how many were read, with those held out.
    """

    def __init__(self, stream: TextStream, tokenizer: Tokenizer, batch_size: int, seq_len: int):
        self.documents = 0
        self._stream, self._tokenizer, self._batch_size, self._seq_len = stream, tokenizer, batch_size, seq_len
        self._dataset, self._documents = stream.dataset(), self._endless()
        self._token_M, self._domain_M = np.zeros(0, np.uint32), np.zeros(0, np.uint8)  # read, but not yet in a batch
        self._step, self._global_batch = -1, None

    def batch(self, step: int, micro: int = 0, micros: int = 1, rank: int = 0, world: int = 1) -> Batch:
        """The sequences of one step that one rank computes in one micro-batch: of the last step or of the next one.

        Returns: token_BS1 and domain_BS1 [B, S + 1], with B = batch_size / (micros * world).
        Fails: UserError where the batch does not divide so, or where the stream has no text.
        """
        mine = share(self._batch_size, micro, micros, rank, world)
        if step == self._step + 1:
            self._global_batch, self._step = self._next_batch(), step
        assert step == self._step, f"a stream is read step by step: {self._step} cannot be followed by {step}"
        assert self._global_batch is not None, "the step before a saved position cannot be read again"
        token_BS1, domain_BS1 = self._global_batch
        return token_BS1[mine], domain_BS1[mine]

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step, of plain numbers, strings, lists and dicts."""
        return {
            "data": self._stream.data,
            "step": self._step,
            "documents": self.documents,
            "dataset": self._dataset.state_dict() if self.documents else None,
            "domains": list(self._stream.domains),
            "token": self._token_M.tolist(),
            "domain": self._domain_M.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position. Fails: UserError where it was saved for other data."""
        if state["data"] != self._stream.data:
            raise UserError(
                f"The checkpoint was trained on {state['data']!r}, not on {self._stream.data!r}; name the same data, "
                "or start a new training."
            )
        self._step, self.documents, self._global_batch = state["step"], state["documents"], None
        self._stream.domains[:] = state["domains"]
        self._token_M, self._domain_M = np.array(state["token"], np.uint32), np.array(state["domain"], np.uint8)
        self._dataset, self._documents = self._stream.dataset(), self._endless()
        if state["dataset"]:
            self._dataset.set_epoch(state["dataset"]["epoch"])
            self._dataset.load_state_dict(state["dataset"])

    def _next_batch(self) -> Batch:
        """Read on until there is a global batch; the last token stays, to be the first input of the next one."""
        needed = self._batch_size * self._seq_len
        tokens, domains, length = [self._token_M], [self._domain_M], len(self._token_M)
        while length <= needed:
            document = next(self._documents)
            ids = self._tokenizer.encode(document.text)
            tokens += [ids, np.array([SEPARATOR], ids.dtype)]
            domains.append(np.full(len(ids) + 1, self._stream.domains.index(document.domain), np.uint8))
            length += len(ids) + 1
        token_M, domain_M = np.concatenate(tokens), np.concatenate(domains)
        self._token_M, self._domain_M = token_M[needed:], domain_M[needed:]
        return gather(token_M, domain_M, np.arange(self._batch_size) * self._seq_len, self._seq_len)

    def _endless(self) -> Iterator[Document]:
        """The documents to train on, pass after pass."""
        found = self._step >= 0  # a saved position may stand at the end of a pass
        while True:
            for document in self._stream.read(self._dataset):
                self.documents += 1
                if not held_out(document):
                    found = True
                    yield document
            if not found:
                raise UserError(f"The data {self._stream.data!r} holds no text to train on; name a larger data set.")
            found = False
            self._dataset.set_epoch(self._dataset.epoch + 1)  # another order of its files, where it has several


def held_out(document: Document) -> bool:
    """Whether a stream's document is for validation."""
    return int(digest(document.text)[:16], 16) % HELD_OUT == 0


def _parse(data: str) -> tuple[str, str, str]:
    """The name, the split and the column of the text."""
    parts = re.fullmatch(r"hf:([^:]+)(?::([^:]+))?(?::([^:]+))?", data)
    if not parts:
        raise UserError(f"There is no data {data!r}; write hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:COLUMN.")
    return str(Path(parts[1]).expanduser()), parts[2] or "train", parts[3] or "text"


def _open(name: str, split: str) -> tuple[Any, dict[str, Any]]:
    """The data set and its first row."""
    datasets = _library()
    path, configuration = name, None
    if name.count("/") == 2 and not Path(name).exists():
        path, _, configuration = name.rpartition("/")
    try:
        dataset = datasets.load_dataset(path, configuration, split=split, streaming=True)
        return dataset, next(iter(dataset))
    except StopIteration as error:
        raise UserError(f"The data set {name} has no rows in its split {split!r}; name another.") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(". ")
        raise UserError(
            f"The data set {name} with split {split!r} cannot be opened ({reason}); check its name and the connection, "
            "or name a folder as hf:/path/to/folder."
        ) from error


def _library() -> ModuleType:
    """The `datasets` package."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError("Streaming text needs the package datasets: pip install 'equipoise[hf]'.") from error
    return datasets
