"""Which rank owns which expert, over all layers: heavy experts fill what balanced light ones leave free."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from equipoise.errors import require


def heterogeneous_owners(
    load_LE: Int[np.ndarray, "L E"], num_ranks: int, overlap: int, ranks_per_node: int = 8
) -> Int[np.ndarray, "L E"]:
    """Owners of every layer's experts for sharded-sparse parallelism; layers may differ in experts per rank.

    Each layer's ``overlap`` heaviest experts will be materialised everywhere, so their owner hardly matters. The others
    are balanced first: heaviest first to the least-loaded node of the layer, then to its least-loaded rank.

    Args:
        load_LE: rows of each expert in past iterations.
        num_ranks: ranks.
        overlap: experts of each layer that are materialised.
        ranks_per_node: ranks of a node, consecutive.
    Returns:
        the owner of each expert; all ranks own equally many over all layers, or one more or less.
    Fails: UserError for loads or settings that do not fit.
    Source: arXiv 2502.02581, heterogeneous sharding. INFERRED: "load" is that of the layer at hand; ranks with equal
    load go by fewer free slots, then by id; the heaviest experts, which the paper places arbitrarily, go from the
    heaviest on to the rank with the most free slots.
    """
    require(load_LE.ndim == 2 and load_LE.size > 0, f"load_LE must be [layers, experts], but is {list(load_LE.shape)}.")
    require(int(load_LE.min()) >= 0, "Loads must not be negative.")
    require(min(num_ranks, ranks_per_node) >= 1 and overlap >= 0, "Ranks must be at least 1, overlap at least 0.")
    num_layers, num_experts = load_LE.shape
    order_LE = np.argsort(-load_LE, axis=1, kind="stable")
    heavy_LJ, light_LJ = order_LE[:, :overlap], order_LE[:, overlap:]
    free_R = np.bincount(np.arange(num_layers * num_experts) % num_ranks, minlength=num_ranks)
    owner_LE = np.empty((num_layers, num_experts), dtype=np.int64)
    heaviest_L = np.take_along_axis(load_LE, light_LJ, 1).max(1, initial=0)
    for layer in np.argsort(-heaviest_L, kind="stable").tolist():
        load_R = np.zeros(num_ranks, dtype=np.int64)
        for expert in light_LJ[layer].tolist():
            rank = _least_loaded(load_R, free_R, ranks_per_node)
            owner_LE[layer, expert] = rank
            load_R[rank] += load_LE[layer, expert]
            free_R[rank] -= 1
    for layer, heavy in enumerate(heavy_LJ.tolist()):
        for expert in heavy:
            rank = int(free_R.argmax())
            owner_LE[layer, expert] = rank
            free_R[rank] -= 1
    return owner_LE


def _least_loaded(load_R: Int[np.ndarray, " R"], free_R: Int[np.ndarray, " R"], ranks_per_node: int) -> int:
    """The rank with a free slot on the least-loaded node, and there the least-loaded."""
    on_node = np.add.reduceat(load_R, range(0, len(load_R), ranks_per_node)).tolist()

    def preference(rank: int) -> tuple[int, int, int, int, int]:
        node = rank // ranks_per_node
        return on_node[node], node, int(load_R[rank]), int(free_R[rank]), rank

    return min(np.flatnonzero(free_R).tolist(), key=preference)
