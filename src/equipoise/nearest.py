"""The word that was probably meant."""

import difflib
from collections.abc import Iterable


def nearest(word: str, words: Iterable[str]) -> str:
    """A hint at the nearest of the known words, ready to follow the wrong one; empty where none is near.

    Names with dots are also known by their last part.
    """
    known = {name.rpartition(".")[2]: name for name in words} | {name: name for name in words}
    near = difflib.get_close_matches(word, known, n=1) or [name for name in known if name.startswith(word)]
    return f" (did you mean {known[near[0]]!r}?)" if near else ""
