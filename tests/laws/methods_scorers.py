"""What the laws need to know of centroids, of one pool for all layers, and of ReLU routing."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from equipoise.routing.norm import length_constant

ACTIVE = "a token has as many experts as are active for it, not K"
COUNTS = "its router learns by counts, not by gradient"
SHARES = "its state is the pool's shares, and takes what it sees"

START = 0.0625  # a loss above rounding, and a number that fp32 holds exactly
SETTINGS: dict[str, dict[str, Any]] = {"relu": {"relu_loss.start": START}}
PER_CALL = {"relu": "its loss counts the loads of one micro-batch on one rank, by definition"}
EXEMPTIONS: dict[tuple[str, str], str] = {
    ("kmeans", "test_foreign_loops.test_the_gradient_that_all_must_give_has_all_losses_in_it"): COUNTS,
    ("kmeans", "test_losses.test_losses_reach_the_router_as_written"): COUNTS,
    ("kmeans", "test_overriding.test_replay_keeps_rows_and_live_weights"): COUNTS,
    ("kmeans", "test_overriding.test_replay_gradient_is_right"): COUNTS,
    ("kmeans", "test_state.test_no_choice_no_update"): "its centroids follow their tokens, also without a choice",
    ("unipool", "test_state.test_no_choice_no_update"): SHARES,
    ("unipool", "test_state.test_all_tokens_to_one_expert"): "its state is a price, which rises where a bias falls",
    ("relu", "test_losses.test_a_dropped_row_is_demand"): ACTIVE,
    ("relu", "test_state.test_no_choice_no_update"): ACTIVE,
}


def pool_loss(layer: Any, logit_TE: Tensor) -> Tensor:
    """``sum_i price_i mean_t sigma c max(0, z_i / (|z| + 1e-8))``."""
    length_T1 = logit_TE.square().sum(1, keepdim=True).sqrt() + 1e-8
    score_TE = layer.scorer.sigma * length_constant(logit_TE.shape[1], layer.top_k) * logit_TE.clamp(min=0) / length_T1
    return (layer.balancers["pool_loss"].price_E * score_TE.mean(0)).sum()


def relu_loss(layer: Any, logit_TE: Tensor) -> Tensor:
    """``lambda E / (K T^2) sum_i (tokens with a positive logit) (sum_t positive logits)``."""
    num_tokens, num_experts = logit_TE.shape
    total = sum((column > 0).sum() * column[column > 0].sum() for column in logit_TE.T)
    return START * num_experts / (layer.top_k * num_tokens**2) * total


FORMULAS: dict[str, Callable[..., Tensor]] = {"pool_loss": pool_loss, "relu_loss": relu_loss}
