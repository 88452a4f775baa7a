"""ReMoE's loss: pays for active experts, and steers by its own coefficient how many there are."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancing.balancer import Balancer
from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require
from equipoise.precision import FixedPrecision

LOWEST, HIGHEST = 1e-30, 1e30


class ReluLoss(FixedPrecision, Balancer):
    """``coefficient * sum_i f_i mean_t gate_ti``, f_i = E * (rows of i) / (K * tokens): L1, dearer for busy experts.

    After each step the coefficient is multiplied by ``factor`` if more than K experts per token were active on average
    over all layers, and divided by it if fewer were.

    Args:
        num_experts: E.
        start: the coefficient at the first step; 0 leaves the loss out.
        factor: of a step.

    Attributes:
        coefficient: lambda, 0-d; saved with the model.
        sparsity: of the last step, 0-d: the share of experts that were not active.

    Source: ReMoE (2412.14711), as its authors' code (thu-ml/ReMoE) has it, where layers' losses add up, too.
    Differs: the sparsity is a mean over tokens, not over micro-batches; the coefficient stays within 1e-30 and 1e30,
    and stands still where exactly K experts were active, where theirs falls.
    """

    weight = 1.0  # the coefficient is the slope: it moves, and nothing may wait to read it
    across_layers = True
    coefficient: Float[Tensor, ""]
    sparsity: Float[Tensor, ""]

    def __init__(self, num_experts: int, *, start: float = 1e-8, factor: float = 1.2):
        super().__init__()
        known = start == 0 or LOWEST <= start <= HIGHEST
        require(known, f"relu_loss.start={start} is no coefficient; give a number from {LOWEST} to {HIGHEST}, or 0.")
        require(1 < factor < math.inf, f"relu_loss.factor={factor} must be above 1, or the sparsity is not steered.")
        self.factor, self.lowest = factor, min(start, LOWEST)
        self.register_buffer("coefficient", torch.tensor(start, dtype=torch.float32))
        self.register_buffer("sparsity", torch.zeros((), dtype=torch.float32))

    def loss(self, call: Call, scores: Scores, routing: Routing) -> Tensor:
        """The scalar loss without its coefficient."""
        gate_E = call.mean(scores.gate_TE)
        wanted = (call.k * call.tokens().clamp(min=1)).to(gate_E.dtype)
        return (routing.demand_E().to(gate_E.dtype) * gate_E).sum() * (len(gate_E) / wanted)

    def slope(self, carrier: Tensor, demand_E: Int[Tensor, " E"]) -> Tensor:
        """The coefficient."""
        return self.coefficient.to(carrier.dtype)

    def readings(self) -> dict[str, Tensor]:
        """The sparsity of the last step, and the coefficient it led to."""
        return {"sparsity": self.sparsity, "coefficient": self.coefficient}

    def statistics(self, call: Call, scores: Scores, routing: Routing) -> dict[str, Tensor]:
        """How many rows there were, should have been, and could have been."""
        demand_E, tokens = routing.demand_E(), call.tokens()
        return {"rows": demand_E.sum(), "wanted": tokens * call.k, "possible": tokens * len(demand_E)}

    def update(self, statistics: dict[str, Tensor]) -> None:
        """One step of the coefficient; without tokens all stays."""
        rows, possible = statistics["rows"], statistics["possible"]
        turn = torch.sign(rows - statistics["wanted"])
        self.coefficient.mul_(self.factor ** turn.double()).clamp_(self.lowest, HIGHEST)
        self.sparsity.copy_(torch.where(possible > 0, 1 - rows / possible.clamp(min=1), self.sparsity))
