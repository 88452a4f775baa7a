"""What every scorer is."""

from torch import nn

from equipoise.routing.router import Router


class Scorer(nn.Module):
    """Tokens to scores: a scorer is one with ``forward(call) -> Scores``.

    Args:
        num_experts: E, null experts included.
    """

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts

    def make_router(self, dim: int) -> nn.Module:
        """What turns tokens of width D into the logits that this scorer reads; ``weight`` is ``[E, D]``."""
        return Router(dim, self.num_experts)
