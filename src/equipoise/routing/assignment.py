"""The best assignment of tokens to experts with equal loads, exactly: prices first, then shortest paths."""

import numpy as np
from jaxtyping import Bool, Float, Int

SWEEPS = 12  # of the prices; more leave fewer paths to find
TIE = 1e-10  # of the largest score: what differs by less is equal


def assign(score_TE: Float[np.ndarray, "T E"], k: int) -> Bool[np.ndarray, "T E"]:
    """Choose K experts per token with the highest total score, where loads are T K / E, rounded down or up.

    Choosing by score plus a price per expert is the best that can be had with the loads it leads to, so prices that
    make loads nearly equal leave little to mend. Each unit that is still misplaced then moves along the path of tokens
    that loses least, which keeps the rest optimal (successive shortest paths).

    Args:
        score_TE: finite.
        k: 1 <= k <= E.
    """
    assert np.isfinite(score_TE).all(), "no path has a length where a score is not finite, so the repair had no end"
    num_tokens, num_experts = score_TE.shape
    if k == num_experts or not num_tokens:
        return np.ones(score_TE.shape, dtype=bool)
    scale = float(np.abs(score_TE).max()) or 1.0
    # Distinct scores, or equal ones would crowd onto the same experts and take thousands of paths to spread.
    # Of size 1, so that no sum of scores overflows.
    score_TE = score_TE / np.float64(scale) + TIE * np.random.default_rng(0).random(score_TE.shape)
    ranked_TE = score_TE + _prices(score_TE, k)
    chosen_TE = np.zeros(score_TE.shape, dtype=bool)
    np.put_along_axis(chosen_TE, np.argpartition(ranked_TE, -k, axis=1)[:, -k:], True, axis=1)
    _Repair(score_TE, chosen_TE).run()
    return chosen_TE


def _prices(score_TE: Float[np.ndarray, "T E"], k: int) -> Float[np.ndarray, " E"]:
    """A price per expert under which loads are nearly equal: the dual's turns, as in ``quantile``, between cutoffs."""
    num_tokens, num_experts = score_TE.shape
    share = min(num_tokens * k // num_experts, num_tokens - 1)
    score_ET = np.ascontiguousarray(score_TE.T)
    price_E = np.zeros(num_experts)
    for _ in range(SWEEPS):
        best_TE = np.partition(score_TE + price_E, -k - 1, axis=1)  # at one place: numpy is slow at two
        cutoff_T = (best_TE[:, -k - 1] + best_TE[:, -k:].min(1)) / 2
        price_E = np.partition(cutoff_T - score_ET, share, axis=1)[:, share]
        price_E -= price_E.mean()
    return price_E


class _Repair:
    """Moves single units between experts until loads differ by one at most and no move gains.

    Attributes:
        loss_EE: the least that moving one token from an expert (row) to another (column) loses.
    """

    def __init__(self, score_TE: Float[np.ndarray, "T E"], chosen_TE: Bool[np.ndarray, "T E"]):
        num_experts = score_TE.shape[1]
        self.score_TE, self.chosen_TE = score_TE, chosen_TE
        self.load_E = chosen_TE.sum(0)
        rows = int(self.load_E.sum())
        self.low, self.high = rows // num_experts, -(-rows // num_experts)
        self.tolerance = 1e-14 * float(np.abs(score_TE).max())
        self.loss_EE = np.full((num_experts, num_experts), np.inf)
        for expert in range(num_experts):
            self._find_losses(expert)

    def run(self) -> None:
        """Move until done; every move mends a load, or gains."""
        while True:
            over_E, under_E = self.load_E > self.high, self.load_E < self.low
            source_E = over_E if over_E.any() else self.load_E > self.low
            target_E = under_E if under_E.any() else self.load_E < self.high
            distance_E, before_E = self._shortest_paths(source_E)
            distance_E[~target_E] = np.inf
            end = int(distance_E.argmin())
            if not (over_E.any() or under_E.any()) and distance_E[end] >= -self.tolerance:
                return
            self._move_along(end, before_E)

    def _find_losses(self, expert: int) -> None:
        """Fill the expert's row of ``loss_EE``."""
        token_N = np.flatnonzero(self.chosen_TE[:, expert])
        loss_NE = self.score_TE[token_N, expert][:, None] - self.score_TE[token_N]
        loss_NE[self.chosen_TE[token_N]] = np.inf
        self.loss_EE[expert] = loss_NE.min(0, initial=np.inf)

    def _shortest_paths(
        self, source_E: Bool[np.ndarray, " E"]
    ) -> tuple[Float[np.ndarray, " E"], Int[np.ndarray, " E"]]:
        """What it loses at least to bring a unit from any source to each expert, and the expert before it (or -1)."""
        distance_E = np.where(source_E, 0.0, np.inf)
        before_E = np.full(len(source_E), -1)
        for _ in range(len(source_E)):
            through_EE = distance_E[:, None] + self.loss_EE
            shorter_E = through_EE.min(0)
            better_E = shorter_E < distance_E - self.tolerance
            if not better_E.any():
                break
            before_E[better_E] = through_EE.argmin(0)[better_E]
            distance_E = np.where(better_E, shorter_E, distance_E)
        return distance_E, before_E

    def _move_along(self, end: int, before_E: Int[np.ndarray, " E"]) -> None:
        """Move one token per edge of the path that ends here; loads change at its two ends alone."""
        stale = {end}
        self.load_E[end] += 1
        while before_E[end] >= 0:
            start = int(before_E[end])
            stale |= self._move(start, end) | {start}
            end = start
        self.load_E[end] -= 1
        for expert in stale:
            self._find_losses(expert)

    def _move(self, start: int, end: int) -> set[int]:
        """Move the token that loses least, and return the experts whose losses it alone had set."""
        movable_T = self.chosen_TE[:, start] & ~self.chosen_TE[:, end]
        score_TE = self.score_TE
        token = int(np.where(movable_T, score_TE[:, start] - score_TE[:, end], np.inf).argmin())
        other_N = np.flatnonzero(self.chosen_TE[token])
        self.chosen_TE[token, start], self.chosen_TE[token, end] = False, True
        new_N = score_TE[token, other_N] - score_TE[token, start]  # it may come back from these
        self.loss_EE[other_N, start] = np.minimum(self.loss_EE[other_N, start], new_N)
        lost_N = score_TE[token, other_N] - score_TE[token, end]  # and can go from these to its new expert no more
        return set(other_N[self.loss_EE[other_N, end] == lost_N].tolist())
