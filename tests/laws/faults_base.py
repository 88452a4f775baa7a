"""Faults of the sequence loss, of the dual's schedule and of DeepSeek-V3's recipe."""

from dataclasses import replace

import torch

from equipoise.balancing.balance_loss import BalanceLoss
from equipoise.balancing.bias import Bias
from laws.fault import Fault, breaking


class PoolsSequences(BalanceLoss):
    """All tokens of the call are one sequence."""

    def loss(self, call, scores, routing):
        pooled = replace(call, sequence_T=torch.zeros_like(call.sequence_T), num_sequences=1)
        return super().loss(pooled, scores, routing)


class ForgetsTheSteps(Bias):
    """The schedule counts in an attribute, which no checkpoint holds."""

    def update(self, statistics):
        self.count = vars(self).get("count", 0)
        super().update(statistics | {"step_rows": self.count * statistics["demand_E"].sum()})
        self.count += 1


class CountsWithBias(BalanceLoss):
    """The share of the experts that the bias chose."""

    def _chosen(self, call, scores, routing):
        return routing.token_N, routing.expert_N


FAULTS = {
    "sequences are pooled": Fault(
        "test_losses.test_losses_reach_the_router_as_written",
        breaking(balance_loss=PoolsSequences),
        {"method": "sequence"},
    ),
    "the schedule begins anew when resumed": Fault(
        "test_state.test_training_resumes_identically", breaking(bias=ForgetsTheSteps), {"method": "primal_dual"}
    ),
    "the loss counts what the bias chose": Fault(
        "test_losses.test_losses_reach_the_router_as_written",
        breaking(balance_loss=CountsWithBias),
        {"method": "deepseek_v3"},
    ),
}
