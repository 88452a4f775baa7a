"""Documents of named domains, and how a long text becomes documents."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

SHORTEST, LONGEST = 4_000, 16_000  # characters of a piece
BLANK_LINE = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Document:
    """A text of one domain; ``name`` says where it came from."""

    domain: str
    name: str
    text: str


def digest(text: str) -> str:
    """The text's SHA-256 in hexadecimal: what documents are compared, ordered and split by."""
    return hashlib.sha256(text.encode()).hexdigest()


def cut(text: str) -> Iterator[str]:
    """Cut into pieces of 4 to 16 thousand characters that joined give the text; only the last may be shorter.

    A cut is at a blank line; within a longer paragraph at the end of a line; within a longer line anywhere.
    """
    start = 0
    while start < len(text):
        earliest, latest = start + SHORTEST, start + LONGEST
        if blank := BLANK_LINE.search(text, earliest, latest):
            end = blank.end()
        elif len(text) <= latest:
            end = len(text)
        else:
            end = text.rfind("\n", earliest, latest) + 1 or latest
        yield text[start:end]
        start = end
