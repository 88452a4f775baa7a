"""The cost of one layer's plan, phase by phase and rank by rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from equipoise.parallel import Plan, Planner
from equipoise.simulator.cluster import Cluster
from equipoise.simulator.network import Network, resident_traffic, row_traffic, segment_arrays, weight_traffic
from equipoise.simulator.shape import Shape

PHASES = ("attention", "weights", "dispatch", "experts", "combine", "gradients")
FORWARD, BACKWARD = 1, 2  # how much multiplication a pass has, of the forward pass


class Phase(NamedTuple):
    """What all ranks do at once, then wait for the slowest: seconds of each rank's own work."""

    name: str
    seconds_R: Float[np.ndarray, " R"]
    backward: bool = False


@dataclass(frozen=True)
class LayerCost:
    """One layer in one step.

    Attributes:
        phases: in the order in which they run.
        load_R: rows that each rank computes.
        bytes_KL: bytes that pass each link, for rows, weights and gradients (K = 3), all ranks together.
        received_R: experts whose weights each rank receives.
        held_R: experts that each rank keeps between steps.
        dropped: rows that nobody computes.
        transfers: experts that are sent.
    """

    phases: list[Phase]
    load_R: Int[np.ndarray, " R"]
    bytes_KL: Float[np.ndarray, "3 L"]
    received_R: Int[np.ndarray, " R"]
    held_R: Int[np.ndarray, " R"]
    dropped: int
    transfers: int

    @property
    def seconds(self) -> float:
        """Until the slowest rank of the last phase is done."""
        return sum(float(phase.seconds_R.max()) for phase in self.phases)

    @property
    def backward_seconds(self) -> float:
        """The backward pass alone."""
        return sum(float(phase.seconds_R.max()) for phase in self.phases if phase.backward)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A planner, and how its weights travel.

    Attributes:
        planner: decides before the router where its ``window`` is above 0; its weights then travel during attention.
        broadcast: an expert for several ranks is handed on from each to the next, instead of sent by its owner alone.
    """

    planner: Planner
    broadcast: bool = False

    @property
    def ahead(self) -> bool:
        """Whether it decides before the router."""
        return self.planner.window > 0


@dataclass(frozen=True)
class CostModel:
    """What a plan costs on the first ranks of a cluster.

    Rows and weights of planners that wait for the router share the links. Those of planners that decide ahead travel
    while attention computes, and only what is left of them counts; so do their gradients, in the backward pass.

    Source: INFERRED; a roofline per expert and an alpha-beta model per link, as simulators of clusters have it.

    Attributes:
        cluster: the machines.
        network: their links.
        shape: what is computed.
        tokens: of a rank.
        training: with the backward pass.
    """

    cluster: Cluster
    network: Network
    shape: Shape
    tokens: int
    training: bool

    def layer(self, policy: Policy, plan: Plan, load_RE: Int[np.ndarray, "R E"]) -> LayerCost:
        """One layer of one step."""
        rows_RR = row_traffic(plan, load_RE)
        sent_RR = weight_traffic(plan, policy.broadcast)
        replicas_RR = resident_traffic(plan) * self.training
        phases = self._forward(policy, plan, rows_RR, sent_RR)
        if self.training:
            phases += self._backward(policy, plan, rows_RR, sent_RR, replicas_RR)
        trips = 4 if self.training else 2
        fetched = 2 if self.training and plan.rematerialise else 1
        gradients_RR = sent_RR.T * self.training + replicas_RR + replicas_RR.T
        size = self.shape.expert_bytes
        held_R = np.bincount([rank for ranks in plan.resident for rank in ranks], minlength=plan.num_ranks)
        amounts = (
            trips * self.shape.row_bytes * rows_RR,
            fetched * size * sent_RR,
            size * gradients_RR,
        )
        return LayerCost(
            phases=phases,
            load_R=plan.load_R(),
            bytes_KL=np.array([self.network.bytes_L(amount) for amount in amounts]),
            received_R=plan.received_R(),
            held_R=held_R,
            dropped=sum(plan.dropped),
            transfers=len(plan.transfers),
        )

    @property
    def attention_seconds(self) -> float:
        """What a rank computes of a layer besides its experts, forward."""
        flops = 2.0 * self.shape.other_params * self.tokens
        return flops / (self.cluster.flops * self.cluster.software.efficiency)

    def _forward(self, policy: Policy, plan: Plan, rows_RR: np.ndarray, sent_RR: np.ndarray) -> list[Phase]:
        weights_R, dispatch_R = self._weights(policy, sent_RR, rows_RR)
        combine_R = self._rows(rows_RR.T)
        return [
            Phase("attention", np.full(plan.num_ranks, self.attention_seconds)),
            Phase("weights", weights_R),
            Phase("dispatch", dispatch_R),
            Phase("experts", self._experts(plan, FORWARD)),
            Phase("combine", combine_R),
        ]

    def _backward(
        self, policy: Policy, plan: Plan, rows_RR: np.ndarray, sent_RR: np.ndarray, replicas_RR: np.ndarray
    ) -> list[Phase]:
        """The gradients' rows take the forward ways back; attention follows the experts."""
        again_RR = sent_RR if plan.rematerialise else np.zeros_like(sent_RR)
        back_RR = sent_RR.T
        hidden = BACKWARD * self.attention_seconds
        if policy.ahead:
            kept_RR = replicas_RR + replicas_RR.T
            gradients_R = np.maximum(self._sent(back_RR + again_RR + kept_RR) - hidden, 0)
            weights_R = np.zeros(plan.num_ranks)
        else:
            weights_R = self._extra(again_RR, rows_RR)
            gradients_R = self._extra(back_RR, rows_RR.T)
        return [
            Phase("weights", weights_R, True),
            Phase("dispatch", self._rows(rows_RR), True),
            Phase("experts", self._experts(plan, BACKWARD), True),
            Phase("combine", self._rows(rows_RR.T), True),
            Phase("gradients", gradients_R, True),
            Phase("attention", np.full(plan.num_ranks, hidden), True),
        ]

    def _weights(
        self, policy: Policy, sent_RR: np.ndarray, rows_RR: np.ndarray
    ) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
        """What the weights add, and the dispatch of rows."""
        dispatch_R = self._rows(rows_RR)
        if policy.ahead:
            return np.maximum(self._sent(sent_RR) - self.attention_seconds, 0), dispatch_R
        return self._extra(sent_RR, rows_RR), dispatch_R

    def _extra(self, experts_RR: np.ndarray, rows_RR: np.ndarray) -> Float[np.ndarray, " R"]:
        """What experts on the way add where rows take the same links."""
        if not experts_RR.any():
            return np.zeros(len(experts_RR))
        software = self.cluster.software
        slower = software.link_efficiency / software.weight_efficiency
        moving_R = self.network.seconds_R(rows_RR * float(self.shape.row_bytes))
        both_RR = rows_RR * float(self.shape.row_bytes) + experts_RR * (self.shape.expert_bytes * slower)
        return software.plan_seconds + self.network.seconds_R(both_RR) - moving_R

    def _sent(self, experts_RR: np.ndarray) -> Float[np.ndarray, " R"]:
        size = float(self.shape.expert_bytes)
        return self.network.seconds_R(experts_RR * size, self.cluster.software.weight_efficiency)

    def _rows(self, rows_RR: np.ndarray) -> Float[np.ndarray, " R"]:
        """Rows on their way, and half of what a source does to its tokens' rows before and after."""
        touched = self.tokens * self.shape.top_k * self._pass_seconds / 2
        return self.network.seconds_R(rows_RR * float(self.shape.row_bytes)) + touched

    @property
    def _pass_seconds(self) -> float:
        """A row's passes over the memory."""
        return self.cluster.software.row_passes * self.shape.row_bytes / self.cluster.memory_bandwidth

    def _experts(self, plan: Plan, work: int) -> Float[np.ndarray, " R"]:
        """Multiplications of every rank: per expert a roofline, and its rows' passes over the memory."""
        software = self.cluster.software
        rank_S, expert_S, start_S, end_S = segment_arrays(plan)
        key_S = rank_S * len(plan.segments) + expert_S
        rows = np.bincount(key_S, weights=end_S - start_S, minlength=plan.num_ranks * len(plan.segments))
        speed = self.cluster.flops * software.efficiency
        multiplying = self.shape.row_flops * (rows + software.half_rows) / speed
        reading = self.shape.expert_bytes / self.cluster.memory_bandwidth
        seconds = work * np.maximum(multiplying, reading) + software.launch_seconds + rows * work * self._pass_seconds
        return np.where(rows > 0, seconds, 0.0).reshape(plan.num_ranks, -1).sum(1)
