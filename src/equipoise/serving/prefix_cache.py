"""Which prompt blocks one replica holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixCache:
    """Blocks of prompts, the least recently used out first; memory is bounded by its capacity.

    A block is used together with all before it, which count as used later. So a block leaves before those in front of
    it, what is held of a prompt is always a prefix, and its length is found by bisection.

    Args:
        capacity: blocks, at least 1.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def match(self, blocks: Sequence[int]) -> int:
        """How many of the first blocks are held."""
        held = self._held
        if not blocks or blocks[0] not in held:
            return 0
        low, high = 1, len(blocks)
        while low < high:
            middle = (low + high + 1) // 2
            if blocks[middle - 1] in held:
                low = middle
            else:
                high = middle - 1
        return low

    def use(self, blocks: Sequence[int]) -> None:
        """Hold these blocks, as the most recently used."""
        held = self._held
        for block in reversed(blocks):
            held[block] = None
            held.move_to_end(block)
        for _ in range(len(held) - self._capacity):
            held.popitem(last=False)
