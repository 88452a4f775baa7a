"""Faults of the methods that solve an assignment: they see padding, or go on solving in evaluation."""

from dataclasses import replace

from equipoise.balancing.bip import BIP
from equipoise.routing.base import Base
from equipoise.routing.selective_sinkhorn import SelectiveSinkhorn
from equipoise.routing.sinkhorn import Sinkhorn
from equipoise.routing.sparse_transport import SparseTransport
from laws.fault import Fault, breaking


class CountsMarginsOfPadding(BIP):
    def _margins(self, call, scores, biased_TE):
        return super()._margins(replace(call, mask_T=None), scores, biased_TE)


class PlansInEvaluation(SelectiveSinkhorn):
    def _drawn(self, call, scores):
        return super()._drawn(replace(call, training=True), scores)


class WeighsByTheGate(SelectiveSinkhorn):
    """Replayed rows get the gate's weights, on a step whose weights are the plan's."""

    def weigh(self, call, scores, token_N, expert_N):
        return super().weigh(replace(call, training=False), scores, token_N, expert_N)


class PricesPadding(Sinkhorn):
    def _balanced(self, call, scores):
        return super()._balanced(replace(call, mask_T=None), scores)


class SellsPadding(SparseTransport):
    """Padding adds to what every expert must take."""

    def prices(self, call, similarity_ET, kept_C):
        return super().prices(replace(call, mask_T=None), similarity_ET, kept_C)


class AssignsInEvaluation(Base):
    def forward(self, call, scores):
        return super().forward(replace(call, training=True), scores)


PADDING = "test_padding.test_padding_changes_nothing"
LATER_TEXT = "test_symmetry.test_appending_text_changes_no_earlier_output"
FAULTS = {
    "a price counts the margins of padding": Fault(
        PADDING, breaking(bip=CountsMarginsOfPadding), {"method": "bip", "fill": 0.0}
    ),
    "a plan routes in evaluation": Fault(
        LATER_TEXT, breaking(selector=PlansInEvaluation), {"method": "selective_sinkhorn"}
    ),
    "a replayed plan weighs by the gate": Fault(
        "test_overriding.test_replay_of_the_same_is_the_same",
        breaking(selector=WeighsByTheGate),
        {"method": "selective_sinkhorn"},
    ),
    "padding moves the prices of experts": Fault(
        PADDING, breaking(selector=PricesPadding), {"method": "sinkhorn", "fill": 0.0}
    ),
    "padding moves the prices of tokens": Fault(
        PADDING, breaking(selector=SellsPadding), {"method": "sparse_transport", "fill": 0.0}
    ),
    "evaluation solves an assignment": Fault(LATER_TEXT, breaking(selector=AssignsInEvaluation), {"method": "base"}),
}
