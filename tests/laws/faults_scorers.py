"""Faults of centroids, of one pool for all layers, and of ReLU routing."""

from dataclasses import replace

import torch
from torch import nn

from equipoise.balancing.pool_loss import PoolLoss
from equipoise.balancing.relu_loss import ReluLoss
from equipoise.routing.active import Active
from equipoise.routing.centroid import Centroids
from equipoise.routing.norm import Norm
from laws.fault import Fault, breaking


class FollowsAtOnce(Centroids):
    """The centroids move with every micro-batch, before the step."""

    def statistics(self, call, scores, routing):
        found = super().statistics(call, scores, routing)
        self.update(found)
        return found


class CastCentroids(Centroids):
    """The centroids follow the model's dtype."""

    _apply = nn.Module._apply


class ChoosesTheFirst(Norm):
    """Experts without a positive logit are equal, so that the first of them are chosen."""

    def forward(self, call):
        scores = super().forward(call)
        place_E = torch.arange(self.num_experts) * 1e-12  # which of equals topk takes is not said
        return replace(scores, choice_TE=scores.choice_TE.relu() - place_E)


class PricesMicroBatches(PoolLoss):
    """The shares are those of the last micro-batch, as the authors' code has them."""

    def statistics(self, call, scores, routing):
        found = super().statistics(call, scores, routing)
        self.update(found | {"layers": torch.ones((), dtype=torch.int64)})
        return found


class SteersForwards(ReluLoss):
    """The coefficient moves with every forward pass, whether or not a step follows."""

    def loss(self, call, scores, routing):
        self.update(self.statistics(call, scores, routing))
        return super().loss(call, scores, routing)


class SumsToOne(Active):
    """A token's weights are made to sum to 1."""

    def weigh(self, call, scores, token_N, expert_N):
        weight_N = super().weigh(call, scores, token_N, expert_N)
        return weight_N / weight_N.new_full((len(call.x_TD),), 1e-20).index_add(0, token_N, weight_N)[token_N]


FAULTS = {
    "centroids move within a window": Fault(
        "test_state.test_selection_state_stands_still_between_steps",
        breaking(router=FollowsAtOnce),
        {"method": "kmeans"},
    ),
    "centroids are bf16": Fault(
        "test_state.test_state_survives", breaking(router=CastCentroids), {"method": "kmeans", "journey": "bfloat16"}
    ),
    "ties go to the first experts": Fault(
        "test_symmetry.test_permuting_experts_changes_no_output",
        breaking(scorer=ChoosesTheFirst),
        {"method": "unipool", "k": 2},
    ),
    "the pool's shares are of a micro-batch": Fault(
        "test_state.test_selection_state_stands_still_between_steps",
        breaking(pool_loss=PricesMicroBatches),
        {"method": "unipool"},
    ),
    "forwards steer the sparsity": Fault(
        "test_state.test_training_forward_changes_nothing", breaking(relu_loss=SteersForwards), {"method": "relu"}
    ),
    "gates of ReLU sum to one": Fault(
        "test_symmetry.test_weights_ignore_the_selection_state", breaking(selector=SumsToOne), {"method": "relu"}
    ),
}
