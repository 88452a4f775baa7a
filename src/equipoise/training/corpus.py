"""Text to train on: the default corpus, a file or a folder, as documents of named domains."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from equipoise.errors import UserError
from equipoise.training import cache, default_corpus
from equipoise.training.documents import Document, cut, digest


def load(data: str) -> list[Document]:
    """Read documents from wherever ``data`` names.

    Args:
        data: ``default``, four domains found in this Python installation; or a UTF-8 text file, one domain, cut into
            documents of 4 to 16 thousand characters; or a ``.jsonl`` file whose lines are ``{"text": ...}``, each a
            document, optionally with its ``"domain"``; or a folder of such files, where each sub-folder is a domain.
            Hidden files are left out.

    Fails: UserError where there is no text or where a file is not text.
    """
    if data == "default":
        return _default()
    path = Path(data).expanduser()
    if path.is_dir():
        documents = [document for file, domain in _files(path) for document in _documents(file, domain)]
        if not documents:
            raise UserError(
                f"The folder {path} has no text files; put UTF-8 text or .jsonl files into it, "
                "or into a sub-folder for each domain."
            )
        return documents
    if not path.is_file():
        raise UserError(
            f"There is no file or folder {data!r}; data is 'default', a text or .jsonl file, "
            "a folder of such files, or hf:NAME for a data set of the Hugging Face hub."
        )
    documents = list(_documents(path, path.stem))
    if not documents:
        raise UserError(f"The file {path} is empty; name a file with text.")
    return documents


def split(documents: Iterable[Document], validation: float = 0.1) -> tuple[list[Document], list[Document]]:
    """Divide into training and validation documents by a hash of their text.

    A document stays on its side when others are added, and the same text is never on both. Every domain with two
    different documents or more has one on each side; a single one trains.

    Args:
        validation: the share of the documents that is held out, above 0 and below 1.

    Fails: UserError where nothing can be held out.
    """
    if not 0 < validation < 1:
        raise UserError(f"The validation share must be above 0 and below 1, not {validation}.")
    documents = list(documents)
    keys = [digest(document.text) for document in documents]
    domains = defaultdict(set)
    for document, key in zip(documents, keys):
        domains[document.domain].add(key)
    held_out = {key for key in keys if int(key[:16], 16) < validation * 2**64}
    for domain in domains.values():
        if len(domain) > 1 and not domain & held_out:
            held_out.add(min(domain))
        if domain <= held_out:
            held_out.discard(max(domain))
    if not held_out:
        raise UserError(
            "The corpus is a single document, so nothing can be held out for validation; "
            "add documents, or text: files are cut every 4 to 16 thousand characters."
        )
    train = [document for document, key in zip(documents, keys) if key not in held_out]
    return train, [document for document, key in zip(documents, keys) if key in held_out]


def _default() -> list[Document]:
    """The default corpus, from the cache where it is whole."""
    path = cache.folder() / f"corpus-{default_corpus.fingerprint()[:16]}.json"
    try:
        cached = json.loads(path.read_text("utf-8"))
        if cached["sha256"] == digest(json.dumps(cached["documents"])):
            return [Document(*row) for row in cached["documents"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or damaged: it is built anew
    documents = default_corpus.build()
    rows = [[document.domain, document.name, document.text] for document in documents]
    cache.write(path, json.dumps({"sha256": digest(json.dumps(rows)), "documents": rows}))
    return documents


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """The folder's files, each with its domain: the sub-folder of the first level, or else the folder itself."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in parts):
            yield path, parts[0] if len(parts) > 1 else folder.resolve().name


def _documents(path: Path, domain: str) -> Iterator[Document]:
    """One file's documents; none where it is blank."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    except OSError as error:
        raise UserError(f"The file {path} cannot be read ({error.strerror}); make it readable.") from error
    if "\0" in text:
        raise UserError(
            f"The file {path} is not UTF-8 text; save it as UTF-8, leave it out, "
            "or name a folder of Parquet files as hf:FOLDER."
        )
    if path.suffix == ".jsonl":
        yield from _lines(path, text, domain)
    elif text.strip():
        for number, piece in enumerate(cut(text)):
            yield Document(domain, f"{path.name}#{number}", piece)


def _lines(path: Path, lines: str, domain: str) -> Iterator[Document]:
    """The documents of a .jsonl file."""
    for number, line in enumerate(lines.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text, named = record["text"], record.get("domain", domain)
            text.encode()
            valid = "\0" not in text and isinstance(named, str)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            valid = False
        if not valid:
            raise UserError(
                f'{path}, line {number}: a line of a .jsonl file must be {{"text": "..."}} with plain text, '
                'optionally with "domain": "..."; mend or remove the line.'
            )
        if text.strip():
            yield Document(named, f"{path.name}:{number}", text)
