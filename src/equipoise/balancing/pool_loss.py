"""UniPool's loss: the balance of one pool of experts that all layers share."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancing.balancer import Balancer
from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require
from equipoise.precision import FixedPrecision


class PoolLoss(FixedPrecision, Balancer):
    """``E / L * sum_i f_i P_i`` per layer, with the pool's shares f of the last step: summed over L layers, the pool's.

    f_i is the share of all layers' selected rows that expert i got, P_i the layer's mean score. Layers that use other
    experts each are at its minimum if the pool is used evenly. The first step, which knows no shares, adds nothing.

    Args:
        num_experts: E, of the pool.
        weight: of the loss.
        normalized: read scores that sum to 1 over E; else the gates, which a learnable scale can shrink.

    Attributes:
        price_E: ``E / L * f``; saved with the model.

    Source: UniPool (2605.06665), pool loss. Differs: f is of the last optimizer step over all ranks, not of the last
    micro-batch of one, and is saved; layers with more rows count more.
    """

    across_layers = True
    price_E: Float[Tensor, " E"]

    def __init__(self, num_experts: int, *, weight: float = 1e-2, normalized: bool = False):
        super().__init__()
        require(0 <= weight < math.inf, f"pool_loss.weight={weight} is no weight; give a number of at least 0.")
        self.weight, self.normalized = weight, normalized
        self.register_buffer("price_E", torch.zeros(num_experts, dtype=torch.float32))

    def loss(self, call: Call, scores: Scores, routing: Routing) -> Tensor:
        """``P_E``."""
        return call.mean(scores.prob_TE if self.normalized else scores.gate_TE)

    def slope(self, carrier: Tensor, demand_E: Int[Tensor, " E"]) -> Tensor:
        """The price of each expert."""
        return self.price_E.to(carrier.dtype)

    def readings(self) -> dict[str, Tensor]:
        """``max_vio`` of the pool; 0 before the first step."""
        mean = self.price_E.mean()
        return {"max_vio": torch.where(mean > 0, self.price_E.max() / mean - 1, 0)}

    def statistics(self, call: Call, scores: Scores, routing: Routing) -> dict[str, Tensor]:
        """The rows selected for each expert."""
        return {"demand_E": routing.demand_E()}

    def update(self, statistics: dict[str, Tensor]) -> None:
        """Take the prices of the window's rows; without rows they stay."""
        demand_E, layers = statistics["demand_E"], statistics["layers"]
        rows = demand_E.sum()
        price_E = demand_E.double() * len(demand_E) / (rows * layers).clamp(min=1)
        self.price_E.copy_(torch.where(rows > 0, price_E, self.price_E))
