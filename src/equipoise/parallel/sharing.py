"""How the rows of an expert are shared out among the ranks that have it."""

from collections import defaultdict

from equipoise.parallel.plan import Segment, append_rows


def evenly(rows: int, holders: list[int]) -> list[Segment]:
    """Consecutive shares that differ by one row at most; a rank that is listed twice gets two of them."""
    segments: list[Segment] = []
    for copy, rank in enumerate(holders):
        start, end = rows * copy // len(holders), rows * (copy + 1) // len(holders)
        append_rows(segments, rank, start, end - start)
    return segments


def nearest(rows: list[int], holders: list[int], ranks_per_node: int) -> list[Segment]:
    """Each source rank's rows stay on it where it has the expert; else on its node; else they travel anywhere.

    Rows that may go to several ranks are split into shares that differ by one at most, over a source and over all
    sources with the same choice.

    Args:
        rows: of every source rank.
        holders: the ranks that have the expert, ascending; one that is listed twice gets two shares.
        ranks_per_node: ranks of a node, consecutive.
    """
    if len(holders) == 1:
        return evenly(sum(rows), holders)
    on_node: dict[int, list[int]] = defaultdict(list)
    for rank in holders:
        on_node[rank // ranks_per_node].append(rank)
    turn: dict[tuple[int, ...], int] = defaultdict(int)  # the share of each choice that gets the next odd row
    segments: list[Segment] = []
    here, start = set(holders), 0
    for source, count in enumerate(rows):
        chosen = [source] if source in here else on_node.get(source // ranks_per_node, holders)
        share, odd = divmod(count, len(chosen))
        first = turn[tuple(chosen)]
        for position, rank in enumerate(chosen):
            size = share + ((position - first) % len(chosen) < odd)
            append_rows(segments, rank, start, size)
            start += size
        turn[tuple(chosen)] = (first + odd) % len(chosen)
    return segments
