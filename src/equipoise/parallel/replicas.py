"""Replicated experts: a placement made from past loads, and rows shared out among the replicas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from equipoise.parallel.eplb import rebalance_experts
from equipoise.parallel.plan import Plan, Transfer, checked, expected_load
from equipoise.parallel.sharing import evenly, nearest


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """Heavy experts have several replicas, placed by EPLB from the loads of past iterations.

    Source: github.com/deepseek-ai/EPLB for the placement (``rebalance_experts``). EPLB leaves open how rows are shared
    out and assumes equal shares per replica, as ``nearest=False`` does. Differs: every plan is placed anew from
    ``history_WE``; who wants a placement to stay (vLLM moves it every 3,000 steps) keeps handing in the same history.

    Attributes:
        num_slots: replicas in all, a multiple of the ranks, at least the number of experts.
        num_groups: groups of experts that stay on one node.
        num_nodes: nodes of equally many consecutive ranks.
        nearest: rows stay on their rank, else on their node, where a replica is, instead of equal shares.
        resident: True: replicas lie in slots between steps (serving). False: owners send them in every step (training
            without slots); a copy on the owner needs no transfer.
        window: past iterations to place from.
    """

    num_slots: int
    num_groups: int = 1
    num_nodes: int = 1
    nearest: bool = False
    resident: bool = True
    window: int = 1000

    def plan(
        self,
        load_RE: Int[np.ndarray, "R E"],
        owner_E: Int[np.ndarray, " E"],
        history_WE: Int[np.ndarray, "W E"] | None = None,
    ) -> Plan:
        """Plan one step.

        Args:
            load_RE: rows that each rank routes to each expert.
            owner_E: the rank that owns each expert; read only where replicas are not resident.
            history_WE: rows per expert in past iterations, of which the last ``window`` are read; None lets the
                placement see this step's own load.
        Fails: UserError for loads and owners that do not fit, and slots that do not divide.
        """
        load_RE, owner_E = checked(load_RE, owner_E)
        num_ranks = load_RE.shape[0]
        slots_E = self.holders(expected_load(load_RE, history_WE, self.window), num_ranks)
        ranks_per_node = num_ranks // self.num_nodes
        segments = [
            nearest(load_RE[:, expert].tolist(), ranks, ranks_per_node)
            if self.nearest
            else evenly(int(load_RE[:, expert].sum()), ranks)
            for expert, ranks in enumerate(slots_E)
        ]
        held = [sorted(set(ranks)) for ranks in slots_E]
        none_dropped = [0] * len(held)
        if self.resident:
            return Plan(num_ranks, segments, held, [], none_dropped)
        owners = owner_E.tolist()
        sent = [
            Transfer(expert, owner, rank)
            for expert, (owner, ranks) in enumerate(zip(owners, held))
            for rank in ranks
            if rank != owner
        ]
        return Plan(num_ranks, segments, [[owner] for owner in owners], sent, none_dropped)

    def holders(self, load_E: Int[np.ndarray, " E"], num_ranks: int) -> list[list[int]]:
        """The ranks of each expert's replicas, ascending; a rank with two replicas is listed twice.

        Fails: UserError for slots, ranks, nodes and groups that do not divide.
        """
        maps = rebalance_experts(load_E[None], self.num_slots, self.num_groups, self.num_nodes, num_ranks)
        ranks: list[list[int]] = [[] for _ in load_E]
        for slot, expert in enumerate(maps.physical_to_logical[0].tolist()):
            ranks[expert].append(slot // (self.num_slots // num_ranks))
        return ranks
