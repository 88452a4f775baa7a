"""What one policy's steps add up to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from equipoise.simulator.cost import PHASES, CostModel, LayerCost, Phase

TRAFFIC = ("rows", "weights", "gradients")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One policy, simulated: the mean over the measured windows.

    Attributes:
        seconds: of a step.
        phase_seconds_P: until the slowest rank was done, by phase.
        own_PR: each rank's own work in every phase; the rest of ``seconds`` it waits.
        waiting_RR: how long the first rank waited for the second, which was the phase's slowest.
        imbalance: the busiest rank's rows over the mean rank's, mean over layers and windows.
        worst_imbalance: the same in the worst layer.
        bytes_KL: bytes that pass each link, for rows, weights and gradients (K = 3), one group's ranks together.
        peak_bytes_R: memory of each rank.
        dropped: rows of a step that nobody computes.
        transfers: experts that a step sends.
        foresight: a planner that decides ahead saw the loads it was measured on, for want of earlier windows.
        timeline: the phases of the layer whose time is the median one.
    """

    seconds: float
    phase_seconds_P: Float[np.ndarray, " P"]
    own_PR: Float[np.ndarray, "P R"]
    waiting_RR: Float[np.ndarray, "R R"]
    imbalance: float
    worst_imbalance: float
    bytes_KL: Float[np.ndarray, "3 L"]
    peak_bytes_R: Float[np.ndarray, " R"]
    dropped: float
    transfers: float
    foresight: bool
    timeline: list[Phase]

    @property
    def waiting(self) -> float:
        """Share of the ranks' time in which they wait for another."""
        return float(self.waiting_RR.sum() / (self.seconds * len(self.waiting_RR)))


def tally(model: CostModel, costs_WL: list[list[LayerCost]], replicas: int, foresight: bool, spare: bool) -> Outcome:
    """Add up a policy's layers and windows.

    Args:
        model: what the layers were costed with.
        costs_WL: per window, the cost of each layer.
        replicas: groups of ranks that hold the same experts, and reduce their gradients after each step.
        foresight: see ``Outcome``.
        spare: received weights are freed after the forward pass.
    """
    layers = [cost for costs in costs_WL for cost in costs]
    windows, num_ranks = len(costs_WL), model.network.num_ranks
    slowest_P, own_PR = np.zeros(len(PHASES)), np.zeros((len(PHASES), num_ranks))
    waiting_RR = np.zeros((num_ranks, num_ranks))
    for phase in (phase for cost in layers for phase in cost.phases):
        place, last = PHASES.index(phase.name), int(phase.seconds_R.argmax())
        slowest_P[place] += phase.seconds_R[last]
        own_PR[place] += phase.seconds_R
        waiting_RR[:, last] += phase.seconds_R[last] - phase.seconds_R
    reduced = np.mean([_reduction(model, costs, replicas) for costs in costs_WL])
    slowest_P[PHASES.index("gradients")] += reduced * windows
    own_PR[PHASES.index("gradients")] += reduced * windows
    imbalances = [cost.load_R.max() / cost.load_R.mean() for cost in layers]
    return Outcome(
        seconds=float(slowest_P.sum() / windows),
        phase_seconds_P=slowest_P / windows,
        own_PR=own_PR / windows,
        waiting_RR=waiting_RR / windows,
        imbalance=float(np.mean(imbalances)),
        worst_imbalance=float(max(imbalances)),
        bytes_KL=np.sum([cost.bytes_KL for cost in layers], axis=0) / windows,
        peak_bytes_R=np.max([_memory_R(model, costs, spare) for costs in costs_WL], axis=0),
        dropped=sum(cost.dropped for cost in layers) / windows,
        transfers=sum(cost.transfers for cost in layers) / windows,
        foresight=foresight,
        timeline=sorted(layers, key=lambda cost: cost.seconds)[len(layers) // 2].phases,
    )


def _reduction(model: CostModel, costs: list[LayerCost], replicas: int) -> float:
    """What the groups' gradient reduction, a ring during the backward pass, adds to the step."""
    if replicas == 1 or not model.training:
        return 0.0
    held = int(np.sum([cost.held_R for cost in costs], axis=0).max())
    moved = 2 * (replicas - 1) / replicas * held * model.shape.expert_bytes
    speed = model.cluster.far_bandwidth * model.cluster.software.weight_efficiency
    return max(moved / speed - sum(cost.backward_seconds for cost in costs), 0.0)


def _memory_R(model: CostModel, costs: list[LayerCost], spare: bool) -> Float[np.ndarray, " R"]:
    """Memory of experts and their rows: without attention, whose share no policy changes."""
    shape = model.shape
    held_R = np.sum([cost.held_R for cost in costs], axis=0) * float(shape.expert_bytes)
    foreign_LR = np.array([cost.received_R for cost in costs]) * float(shape.expert_bytes)
    load_LR = np.array([cost.load_R for cost in costs])
    if not model.training:
        return held_R + (foreign_LR + load_LR * shape.computed_bytes).max(0)
    kept_R = foreign_LR.max(0) if spare else foreign_LR.sum(0)
    rows_R = load_LR.sum(0) * shape.saved_bytes + load_LR.max(0) * shape.computed_bytes
    return held_R * (shape.state_bytes / shape.value_bytes) + kept_R + rows_R
