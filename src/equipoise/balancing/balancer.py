"""What every balancer is: it may move the choice, and it may add a loss."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from equipoise.contracts import Call, Routing, Scores
from equipoise.precision import FixedPrecision


class Balancer(nn.Module):
    """The balancer that does nothing; the others replace what they need.

    A loss is a *carrier* with a *slope*: its value is ``(slope * carrier).sum()``. Most carriers are the scalar loss
    itself, with slope 1. Where the slope is a count over all ranks, it is known only in the backward pass, when the
    window has counted them; the carrier is then what the slope multiplies.

    Attributes:
        weight: of the loss in what is trained on.
        across_layers: the state is one for all layers of a model; ``update`` then gets the statistics of all layers,
            and their number as ``"layers"``.
        takes_groups: it balances where a token may take experts of a few groups only (``top_k.kept_groups``), too.
    """

    weight: float = 0.0
    across_layers: bool = False
    takes_groups: bool = True

    def adjust(self, call: Call, scores: Scores) -> Scores:
        """The scores with another ``choice``."""
        return scores

    def loss(self, call: Call, scores: Scores, routing: Routing) -> Tensor | None:
        """The loss's carrier, or None where there is no loss."""
        return None

    def slope(self, carrier: Tensor, demand_E: Int[Tensor, " E"]) -> Tensor:
        """The carrier's slope, given the window's demand over all ranks so far."""
        return torch.ones_like(carrier)

    def readings(self) -> dict[str, Tensor]:
        """What the balancer tells of its state, 0-d each, for logs."""
        return {}

    @property
    def needs_all_ranks(self) -> bool:
        """Whether the slope depends on the demand of the other ranks."""
        return False


class SelectionBias(FixedPrecision, Balancer):
    """A bias per expert that is added to the choice, never to the weights; persistent and fp32 whatever the model is.

    Args:
        num_experts: E.
    """

    bias_E: Float[Tensor, " E"]

    def __init__(self, num_experts: int):
        super().__init__()
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))

    def adjust(self, call: Call, scores: Scores) -> Scores:
        """Rank by ``choice + bias``."""
        return Scores(scores.logit_TE, scores.prob_TE, scores.gate_TE, scores.choice_TE + self.bias_E)
