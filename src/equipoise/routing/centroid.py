"""The online K-means router: experts are centroids that follow the tokens they get; nothing in it is trained."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require
from equipoise.precision import FixedPrecision
from equipoise.routing.router import multiply
from equipoise.routing.scorer import Scorer


class Centroid(Scorer):
    """``choice = logit = cos(x, C_e)``, ``prob = gate = softmax(logit / temperature)`` with centroids C.

    Args:
        num_experts: E.
        temperature: of the gates.
        ema: the share of a centroid that a step keeps.
        subtract_mean: take the tokens' running mean off first: one that all tokens have makes their cosines alike.

    Fails: UserError for a temperature or an ema out of range.
    Source: Ahrac et al. 2026 (2605.12476), the online K-means router: centroids are running means, the choice is the
    cosine and a bias that steps by the sign. We read its abstract and second-hand texts only. Differs: none known.
    INFERRED: the gate, that tokens are brought to length 1 first, random directions at the start, every default.
    """

    learns = True  # in its router

    def __init__(self, num_experts: int, *, temperature: float = 0.1, ema: float = 0.99, subtract_mean: bool = False):
        super().__init__(num_experts)
        right = 0 < temperature < math.inf
        require(right, f"centroid.temperature={temperature} is no temperature; give a finite number above 0.")
        require(0 <= ema < 1, f"centroid.ema={ema} must be at least 0 and below 1, or centroids never move.")
        self.temperature, self.ema, self.subtract_mean = temperature, ema, subtract_mean

    def make_router(self, dim: int) -> nn.Module:
        """The centroids."""
        return Centroids(dim, self.num_experts, self.ema, self.subtract_mean)

    def forward(self, call: Call) -> Scores:
        """Score every token against every expert."""
        logit_TE = call.router(call.x_TD)
        prob_TE = (logit_TE / self.temperature).softmax(-1)
        return Scores(logit_TE, prob_TE, prob_TE, logit_TE)


class Centroids(FixedPrecision):
    """Cosines to E centroids, each a running mean of the unit tokens its expert computed; fp32 buffers, no parameters.

    They start as random directions. With ``subtract_mean`` the unit tokens' running mean is taken off, and what is left
    is brought to length 1 again.

    Attributes:
        weight: the centroids ``[E, D]``.
        mean_D: the unit tokens' running mean; only with ``subtract_mean``.
    """

    weight: Float[Tensor, "E D"]
    mean_D: Float[Tensor, " D"]

    def __init__(self, dim: int, num_experts: int, ema: float, subtract_mean: bool):
        super().__init__()
        self.ema, self.subtract_mean = ema, subtract_mean
        self.register_buffer("weight", F.normalize(torch.randn(num_experts, dim, dtype=torch.float32), dim=-1))
        if subtract_mean:
            self.register_buffer("mean_D", torch.zeros(dim, dtype=torch.float32))

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """The cosine of every token with every centroid."""
        token_TD = self._centred(_unit(x_TD))
        return multiply(token_TD, _unit(self.weight.to(token_TD.dtype)))

    def statistics(self, call: Call, scores: Scores, routing: Routing) -> dict[str, Tensor]:
        """The sum of the tokens that each expert computed, in fp64, so that no split shows in the fp32 state."""
        unit_TD = _unit(call.x_TD.detach())
        token_TD = self._centred(unit_TD).double()
        num_experts = len(self.weight)
        chosen_ET = token_TD.new_zeros(num_experts + 1, len(token_TD))
        chosen_ET[routing.expert_N, routing.token_N] = 1.0
        sum_ED = chosen_ET[:num_experts] @ token_TD
        found = {"sum_ED": sum_ED, "count_E": routing.load_E}
        return found | ({"sum_D": unit_TD.double().sum(0), "tokens": call.tokens()} if self.subtract_mean else {})

    def update(self, statistics: dict[str, Tensor]) -> None:
        """Move every centroid towards the mean of its tokens; one without tokens stays."""
        _follow(self.weight, statistics["sum_ED"], statistics["count_E"][:, None], self.ema)
        if self.subtract_mean:
            _follow(self.mean_D, statistics["sum_D"], statistics["tokens"], self.ema)

    def _centred(self, unit_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return F.normalize(unit_TD - self.mean_D, dim=-1) if self.subtract_mean else unit_TD


def _unit(x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
    """Rows at length 1, in at least fp32; padding stays zero."""
    return F.normalize(x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)), dim=-1)


def _follow(state: Tensor, total: Tensor, count: Tensor, ema: float) -> None:
    """One step of a running mean; without counts it stays."""
    state.copy_(torch.where(count > 0, ema * state + (1 - ema) * total / count.clamp(min=1), state))
