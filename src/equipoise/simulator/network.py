"""The network: how long a pattern of traffic takes."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from equipoise.parallel import Plan
from equipoise.simulator.cluster import Cluster


class Network:
    """The links between ``num_ranks`` consecutive ranks of a cluster.

    A rank's traffic within the first link's reach passes its port there; all that goes farther passes its port of every
    link up to the one that reaches. The links work at the same time, and a port sends and receives at the same time.
    """

    def __init__(self, cluster: Cluster, num_ranks: int):
        self.cluster = cluster
        self.num_ranks = num_ranks

    @cached_property
    def passes_LRR(self) -> Bool[np.ndarray, "L R R"]:
        """Whether a message from the second rank to the third passes a port of this link."""
        rank = np.arange(self.num_ranks)
        links = self.cluster.links
        joined = [
            rank[:, None] // link.reach == rank // link.reach if link.reach else np.ones((len(rank),) * 2, dtype=bool)
            for link in links
        ]
        passes = [joined[0] & ~np.eye(len(rank), dtype=bool), *(~joined[level - 1] for level in range(1, len(links)))]
        return np.array(passes)

    def seconds_R(self, traffic_RR: Num[np.ndarray, "R R"], efficiency: float | None = None) -> Float[np.ndarray, " R"]:
        """Time of each rank until it has sent and received its share.

        Args:
            traffic_RR: bytes from the first rank to the second; what stays on a rank does not count.
            efficiency: share of the bandwidth that is reached; None: that of rows.
        """
        software = self.cluster.software
        seconds_R = np.zeros(self.num_ranks)
        for link, passes_RR in zip(self.cluster.links, self.passes_LRR):
            passing_RR = traffic_RR * passes_RR
            busiest_R = np.maximum(
                _port(passing_RR.sum(1), link.ranks_per_port), _port(passing_RR.sum(0), link.ranks_per_port)
            )
            sent_RR = passing_RR > 0
            peers_R = np.maximum(sent_RR.sum(1), sent_RR.sum(0))
            moving_R = busiest_R / (link.bandwidth * (efficiency or software.link_efficiency))
            waiting_R = (peers_R > 0) * link.hops * software.hop_seconds + peers_R * software.message_seconds
            seconds_R = np.maximum(seconds_R, moving_R + waiting_R)
        return seconds_R

    def bytes_L(self, traffic_RR: Num[np.ndarray, "R R"]) -> Float[np.ndarray, " L"]:
        """Bytes that pass each link, all ranks together."""
        return (self.passes_LRR * traffic_RR).sum((1, 2)).astype(float)


def row_traffic(plan: Plan, load_RE: Int[np.ndarray, "R E"]) -> Int[np.ndarray, "R R"]:
    """``plan.traffic_RR``, for plans with many segments: it takes memory for these, not for ranks times these."""
    rank_S, expert_S, start_S, end_S = segment_arrays(plan)
    rows_E = load_RE.sum(0)
    first_E = np.concatenate([[0], rows_E.cumsum()[:-1]])
    source_ends = load_RE.T.ravel().cumsum()
    start_S, end_S = start_S + first_E[expert_S], end_S + first_E[expert_S]
    cuts = np.unique(np.concatenate([start_S, end_S, source_ends]))
    left, size = cuts[:-1], np.diff(cuts)
    traffic_RR = np.zeros((plan.num_ranks, plan.num_ranks), dtype=np.int64)
    if not len(start_S):
        return traffic_RR
    segment = np.searchsorted(start_S, left, side="right") - 1
    computed = (segment >= 0) & (left < end_S[segment])
    source = np.searchsorted(source_ends, left, side="right") % plan.num_ranks
    np.add.at(traffic_RR, (source[computed], rank_S[segment[computed]]), size[computed])
    return traffic_RR


def segment_arrays(plan: Plan) -> Int[np.ndarray, "4 S"]:
    """Rank, expert, start and end of every segment, by expert, then by position."""
    flat = [(rank, expert, start, end) for expert, parts in enumerate(plan.segments) for rank, start, end in parts]
    return np.array(flat, dtype=np.int64).reshape(-1, 4).T


def weight_traffic(plan: Plan, broadcast: bool) -> Int[np.ndarray, "R R"]:
    """Experts from each rank to each other for this step.

    Args:
        plan: whose transfers are sent.
        broadcast: an expert for several ranks is handed on from each to the next, the owner sends it once; else the
            owner sends it to each.
    """
    traffic_RR = np.zeros((plan.num_ranks, plan.num_ranks), dtype=np.int64)
    if not broadcast:
        pairs = [(source, destination) for _, source, destination in plan.transfers]
        return _count(traffic_RR, pairs)
    receivers: dict[tuple[int, int], list[int]] = {}
    for expert, source, destination in plan.transfers:
        receivers.setdefault((expert, source), []).append(destination)
    chains = [_chain(source, ranks, plan.num_ranks) for (_, source), ranks in receivers.items()]
    return _count(traffic_RR, [pair for chain in chains for pair in pairwise(chain)])


def resident_traffic(plan: Plan) -> Int[np.ndarray, "R R"]:
    """Experts from each rank to each other that keep replicas between steps alike: gradients on a chain to the first.

    The weights that come back take the same chain the other way.
    """
    traffic_RR = np.zeros((plan.num_ranks, plan.num_ranks), dtype=np.int64)
    return _count(traffic_RR, [(after, rank) for ranks in plan.resident for rank, after in pairwise(ranks)])


def _chain(source: int, ranks: list[int], num_ranks: int) -> list[int]:
    """Round from the source, so that the chain enters every node once."""
    return [source, *sorted(ranks, key=lambda rank: (rank - source) % num_ranks)]


def _count(traffic_RR: Int[np.ndarray, "R R"], pairs: list[tuple[int, int]]) -> Int[np.ndarray, "R R"]:
    if pairs:
        np.add.at(traffic_RR, tuple(np.array(pairs).T), 1)
    return traffic_RR


def _port(bytes_R: Num[np.ndarray, " R"], ranks_per_port: int) -> Num[np.ndarray, " R"]:
    """Bytes of the port that each rank uses."""
    port_R = np.arange(len(bytes_R)) // ranks_per_port
    return np.bincount(port_R, weights=bytes_R)[port_R]
