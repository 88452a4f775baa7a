"""How much of a prompt is its key: longer for prefixes that many requests share."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Sequence


class KeyLength:
    """A tree of prefixes with the share of the latest requests that begin with each.

    A key is one block. Where more than 2/n of the requests share it, two replicas cannot carry it: it becomes one block
    longer, which splits it. It is merged back when its share falls under 1/n; in between it stays as it is, so that a
    key does not come and go. Memory: at most ``window * deepest`` counts and ``table`` lengthened keys.

    Args:
        window: requests that count.
        least: requests that must be in the window before a key is lengthened.
        deepest: longest key, blocks.
        table: lengthened keys that are remembered, least recently met out first.

    Source: DualMap (arXiv 2602.06502); window 200, least 20 and table 10,000 are its release's. Differs: the thresholds
    are the paper's, not the release's constants 0.0612 and 0.02; the window counts requests, each once; a cold key is
    looked for where it was lengthened, at its parent (the release looks one block further, and so never shortens); one
    table for all depths. ``deepest`` is INFERRED; 13 blocks is the longest key reported.
    """

    def __init__(self, window: int = 200, least: int = 20, deepest: int = 16, table: int = 10_000) -> None:
        self._least, self._deepest, self._table = least, deepest, table
        self._window: deque[Sequence[int]] = deque()
        self._size = window
        self._counts: Counter[int] = Counter()
        self._lengthened: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        """Entries in memory: counts and lengthened keys."""
        return len(self._counts) + len(self._lengthened)

    def observe(self, blocks: Sequence[int]) -> None:
        """Count one request."""
        path = blocks[: self._deepest]
        self._window.append(path)
        for block in path:
            self._counts[block] += 1
        if len(self._window) > self._size:
            for block in self._window.popleft():
                self._counts[block] -= 1
                if not self._counts[block]:
                    del self._counts[block]

    def depth(self, blocks: Sequence[int], num_replicas: int) -> int:
        """Blocks that are the key of this prompt now, at least 1; lengthens and shortens on the way."""
        path = blocks[: self._deepest]
        for depth, block in enumerate(path[:-1], 1):
            if not self._is_lengthened(block, num_replicas):
                return depth
        return len(path)

    def _is_lengthened(self, block: int, num_replicas: int) -> bool:
        share = self._counts.get(block, 0) / max(len(self._window), 1)
        if block in self._lengthened:
            if share < 1 / num_replicas:
                del self._lengthened[block]
                return False
            self._lengthened.move_to_end(block)
            return True
        if share <= 2 / num_replicas or len(self._window) < self._least:
            return False
        self._lengthened[block] = None
        if len(self._lengthened) > self._table:
            self._lengthened.popitem(last=False)
        return True
