"""Loss-free balancing: a selection bias that steps against each expert's excess load."""

import math

import torch
from torch import Tensor

from equipoise.balancing.balancer import SelectionBias
from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require


class Bias(SelectionBias):
    """``bias_i += rate * sign(mean load - load_i)`` once per optimizer step, from that step's global load.

    Args:
        num_experts: E.
        rate: the step; tied to the scale of the scores (sigmoid scores lie in [0, 1]).

    Source: Wang et al. 2024 (2408.15664), algorithm 1. Differs: no.
    """

    def __init__(self, num_experts: int, *, rate: float = 1e-3):
        super().__init__(num_experts)
        require(0 <= rate < math.inf, f"bias.rate={rate} is no step; give a number of at least 0.")
        self.rate = rate

    def statistics(self, call: Call, scores: Scores, routing: Routing) -> dict[str, Tensor]:
        """The rows selected for each expert."""
        return {"demand_E": routing.demand_E()}

    def update(self, statistics: dict[str, Tensor]) -> None:
        """One step of the bias."""
        demand_E = statistics["demand_E"]
        # In integers, E*load against the sum: a mean in floating point would call equal loads unequal.
        self.bias_E += self.rate * torch.sign(demand_E.sum() - len(demand_E) * demand_E)
