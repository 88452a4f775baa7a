"""Binary-integer-programming balancing: a price per expert from the dual of the assignment with capacities."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancing.balancer import SelectionBias
from equipoise.balancing.cutoff import cutoffs
from equipoise.balancing.histogram import crossing, histogram
from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require

ORDERS = ("old_dual", "paper")


class BIP(SelectionBias):
    """Choose by ``score - q`` with a price q >= 0 per expert; ``bias_E`` is ``-q``.

    Maximise the sum of chosen scores with at most K experts per token and ``T K / E`` tokens per expert. Its dual has a
    price p per token and q per expert, none negative, which are minimised in turn; one turn is

        ``p_t = max(0, (K+1)-th largest of s_te - q_e)``,  ``q_e = max(0, (T K / E + 1)-th largest of s_te - p_t)``.

    The second is a quantile of the margins ``s_te - p_t``. It is read from a histogram of integers that sums over ranks
    and micro-batches; bins are even in the margin's root, since softmax scores crowd near 0, and the error is at most
    one bin's width, ``2 sqrt(q) / bins``. Scores must lie in [0, 1]. Clipping at 0 makes crowded experts dear, but
    never idle ones cheap; ``quantile`` is the same without it.

    Args:
        num_experts: E.
        iterations: turns, from the last step's q.
        order: what routes. ``"old_dual"``: the last step's q, so that no token sees another; each micro-batch takes
            its turns aside, and the last turn's margins, of all micro-batches together, give the next q. ``"paper"``:
            in training, q solved on the own batch, by which a token's experts depend on later tokens: a left-to-right
            model learns from the future. Evaluation routes by the last step's q in both.
        bins: of the histogram.

    Fails: UserError for settings out of range; of the layer, beside a limit to groups of experts: cutoffs are those of
    all experts, and loads would settle uneven.
    Source: Sun 2025 (2502.15451), read second-hand: the program, its dual and the turns; ``"paper"`` is its order.
    Differs: quantiles to a bin's width; q moves once per optimizer step, also with ``"paper"``, by one turn more than
    routed. INFERRED: softmax scores, the number of turns, the frozen q in evaluation, sums over ranks, and that only
    real tokens count.
    """

    takes_groups = False

    def __init__(self, num_experts: int, *, iterations: int = 4, order: str = "old_dual", bins: int = 1000):
        super().__init__(num_experts)
        require(iterations >= 1, f"bip.iterations={iterations} moves nothing; give a positive number.")
        require(order in ORDERS, f"bip.order={order!r} is unknown; choose one of {', '.join(ORDERS)}.")
        require(bins >= 1, f"bip.bins={bins} is impossible; give a positive number.")
        self.iterations, self.order, self.bins = iterations, order, bins

    @property
    def looks_ahead(self) -> bool:
        """Whether training gives a token experts that depend on other tokens of the call."""
        return self.order == "paper"

    def adjust(self, call: Call, scores: Scores) -> Scores:
        """Rank by ``choice - q``, with the last step's q, or in training with that of the paper's order."""
        if not call.training or self.order == "old_dual":
            return super().adjust(call, scores)
        choice_TE = scores.choice_TE + self._after(self.iterations, call, scores)
        return Scores(scores.logit_TE, scores.prob_TE, scores.gate_TE, choice_TE)

    @torch.no_grad()
    def statistics(self, call: Call, scores: Scores, routing: Routing) -> dict[str, Tensor]:
        """The histogram ``[E, bins]`` of the last turn's margins, and the rows selected."""
        if self.order == "paper":
            biased_TE = scores.choice_TE.detach()
        else:
            biased_TE = scores.gate_TE.detach() + self._after(self.iterations - 1, call, scores)
        rows = torch.zeros_like(call.tokens()) if call.k == len(self.bias_E) else call.tokens() * call.k
        return {"histogram_EB": self._margins(call, scores, biased_TE), "rows": rows}

    def update(self, statistics: dict[str, Tensor]) -> None:
        """Move q to the quantiles of the window's histogram; without rows it stays."""
        rows = statistics["rows"]
        bias_E = self._bias(statistics["histogram_EB"], rows / len(self.bias_E))
        self.bias_E.copy_(torch.where(rows > 0, bias_E, self.bias_E))

    @torch.no_grad()
    def _after(self, turns: int, call: Call, scores: Scores) -> Float[Tensor, " E"]:
        """``-q`` after turns on this call's scores alone."""
        bias_E, target = self.bias_E, call.tokens() * call.k / len(self.bias_E)
        for _ in range(turns):
            bias_E = self._bias(self._margins(call, scores, scores.gate_TE + bias_E), target)
        return bias_E

    def _margins(self, call: Call, scores: Scores, biased_TE: Float[Tensor, "T E"]) -> Int[Tensor, "E bins"]:
        """How many positive margins ``s_te - p_t`` of each expert lie in each bin, the highest first."""
        num_experts = biased_TE.shape[1]
        if call.k == num_experts:  # every expert gets every token: there is no (K+1)-th, and nothing to balance
            return torch.zeros(num_experts, self.bins, dtype=torch.int64, device=biased_TE.device)
        price_T = cutoffs(biased_TE, call.k)[:, 1].clamp(min=0)
        margin_TE = (scores.gate_TE.detach() - price_T[:, None]).clamp_(min=0)
        counted_TE = margin_TE > 0 if call.mask_T is None else (margin_TE > 0) & call.mask_T[:, None]
        return histogram(margin_TE.sqrt_().mul_(-self.bins).add_(self.bins), counted_TE, self.bins)

    def _bias(self, histogram_EB: Int[Tensor, "E bins"], target: Float[Tensor, ""]) -> Float[Tensor, " E"]:
        """``-q`` from the margins; 0 where no more than ``target`` of them are positive."""
        root_E = 1 - crossing(histogram_EB, target) / self.bins
        return torch.where(histogram_EB.sum(-1) > target, root_E, 0).square().neg()
