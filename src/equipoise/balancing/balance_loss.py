"""The load-balancing loss ``E * sum_i f_i P_i``, with f counted per micro-batch or over the global batch."""

import math

from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancing.balancer import Balancer
from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require

SCOPES = ("micro", "global")


class BalanceLoss(Balancer):
    """``E * sum_i f_i P_i``: 1 when balanced, for any E and K; f_i = share of selected rows, P_i = mean probability.

    Args:
        num_experts: E.
        scope: what f is counted over. ``"micro"``: this micro-batch on this rank. ``"global"``: the optimizer step's
            micro-batches so far on all ranks, so that f is exact at the last micro-batch and a running estimate before.
        weight: of the loss.

    Source: ``micro``: Switch (2101.03961), eq. 4 to 6. ``global``: Qiu et al. 2025 (2501.11873), with its buffer over
    micro-batches. Differs: f has the factor 1/K, so that balance reads 1 for any K; no further deviation.
    """

    def __init__(self, num_experts: int, *, scope: str = "global", weight: float = 1e-2):
        super().__init__()
        require(scope in SCOPES, f"balance_loss.scope={scope!r} is unknown; choose one of {', '.join(SCOPES)}.")
        require(0 <= weight < math.inf, f"balance_loss.weight={weight} is no weight; give a number of at least 0.")
        self.scope, self.weight = scope, weight

    @property
    def needs_all_ranks(self) -> bool:
        """True for the global scope."""
        return self.scope == "global"

    def loss(self, call: Call, scores: Scores, routing: Routing) -> Tensor:
        """The scalar loss for ``micro``; ``P_E`` for ``global``."""
        prob_E = call.mean(scores.prob_TE)
        return prob_E if self.scope == "global" else (_slope(routing.demand_E(), prob_E) * prob_E).sum()

    def slope(self, carrier: Tensor, demand_E: Int[Tensor, " E"]) -> Tensor:
        """``E * f`` for ``global``."""
        return _slope(demand_E, carrier) if self.scope == "global" else super().slope(carrier, demand_E)


def _slope(demand_E: Int[Tensor, " E"], like: Tensor) -> Float[Tensor, " E"]:
    """``E * f_E``."""
    return demand_E.to(like.dtype) * (demand_E.shape[0] / demand_E.sum().clamp(min=1).to(like.dtype))
