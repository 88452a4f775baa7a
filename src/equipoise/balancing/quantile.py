"""Quantile balancing: set each expert's bias to what would have given it exactly its share."""

import torch
from torch import Tensor

from equipoise.balancing.balancer import SelectionBias
from equipoise.balancing.cutoff import cutoffs
from equipoise.balancing.histogram import crossing, histogram
from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require

CUTOFFS = ("lower", "mid")


class Quantile(SelectionBias):
    """One exact block of the assignment's dual per optimizer step; no step size.

    With ``alpha_t`` the cutoff of token t, the (K+1)-th largest of its biased scores, expert e would win the token from
    the bias ``alpha_t - score_te`` on. The new bias of e is the quantile of these that ``tokens * K / E`` tokens lie
    under. The quantile is read from a histogram of integers, so that neither the split over ranks nor over
    micro-batches matters; its error is at most one bin's width, ``(max bias - min bias + 2) / bins``. Scores must lie
    in [0, 1].

    Args:
        num_experts: E.
        bins: of the histogram.
        ema: share of the old bias that is kept; 0 takes the quantile as it is.
        cutoff: ``"lower"`` is the (K+1)-th score, best for one update per step; ``"mid"`` lies halfway to the K-th, for
            updates iterated on the same scores, which ``"lower"`` may let stall short of balance.

    Fails: UserError for settings out of range; of the layer, beside a limit to groups of experts: cutoffs are those of
    all experts, and loads would settle uneven.
    Source: Su 2026 and Kimi K3 as reported second-hand: the old bias routes, one update follows, centred; histogram of
    the required bias over [min bias - 1, max bias + 1] with interpolation inside the crossing bin. Differs: where the
    target is a whole number, the quantile is the next order statistic, as the (K+1)-th is on the tokens' side.
    ``cutoff="mid"`` is ours. INFERRED, since the primary text was not readable: with padding the target counts real
    tokens only.
    """

    takes_groups = False

    def __init__(self, num_experts: int, *, bins: int = 1000, ema: float = 0.0, cutoff: str = "lower"):
        super().__init__(num_experts)
        require(bins >= 1, f"quantile.bins={bins} is impossible; give a positive number.")
        require(0 <= ema < 1, f"quantile.ema={ema} must be at least 0 and below 1, or the bias never moves.")
        require(cutoff in CUTOFFS, f"quantile.cutoff={cutoff!r} is unknown; choose one of {', '.join(CUTOFFS)}.")
        self.bins, self.ema, self.cutoff = bins, ema, cutoff

    def statistics(self, call: Call, scores: Scores, routing: Routing) -> dict[str, Tensor]:
        """The histogram ``[E, bins]`` of required biases, and the rows selected."""
        num_tokens, num_experts = scores.choice_TE.shape
        if call.k == num_experts:  # every expert gets every token: there is no (K+1)-th, and nothing to balance
            histogram_EB = torch.zeros(num_experts, self.bins, dtype=torch.int64, device=self.bias_E.device)
            return {"histogram_EB": histogram_EB, "rows": histogram_EB.sum()}
        choice_TE = scores.choice_TE.detach()
        upper_T, lower_T = cutoffs(choice_TE, call.k).unbind(-1)
        alpha_T = lower_T if self.cutoff == "lower" else (upper_T + lower_T) / 2
        required_TE = alpha_T[:, None] - (choice_TE - self.bias_E)
        low, width = self._range()
        real_T = (
            torch.ones(num_tokens, dtype=torch.bool, device=choice_TE.device) if call.mask_T is None else call.mask_T
        )
        histogram_EB = histogram((required_TE - low) / width, real_T[:, None].expand_as(required_TE), self.bins)
        return {"histogram_EB": histogram_EB, "rows": call.tokens() * call.k}

    def update(self, statistics: dict[str, Tensor]) -> None:
        """Move the bias to the quantiles of the window's histogram; without rows it stays."""
        rows = statistics["rows"]
        low, width = self._range()
        bias_E = low + width * crossing(statistics["histogram_EB"], rows / len(self.bias_E))
        bias_E = self.ema * self.bias_E + (1 - self.ema) * (bias_E - bias_E.mean())
        self.bias_E.copy_(torch.where(rows > 0, bias_E, self.bias_E))

    def _range(self) -> tuple[Tensor, Tensor]:
        """The histogram's lower edge and the width of a bin: fixed between steps, since the bias is."""
        low, high = self.bias_E.min() - 1, self.bias_E.max() + 1
        return low, (high - low) / self.bins
