"""Shadowing: the most popular experts are broadcast, and every rank computes its own rows of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from equipoise.errors import require
from equipoise.parallel.native import native_plan
from equipoise.parallel.plan import Plan, Transfer, checked
from equipoise.parallel.sharing import nearest


@dataclass(frozen=True, kw_only=True)
class Shadow:
    """FasterMoE's shadowing policy.

    Walking down the experts from the heaviest, one more is shadowed as long as the modelled latency falls: the busiest
    unshadowed expert's rows cost computation and messages, every shadowed expert a broadcast.

    Source: He et al. 2022 (FasterMoE) and ``fmoe/fastermoe/shadow_policy.py`` of laekov/fastmoe. Differs: the number of
    matrices and the bytes of a value are settings (there: two matrices of float32). As there, the rows that the ranks
    compute of shadowed experts cost nothing in the model, and the lightest expert is never shadowed.

    Attributes:
        dim: width of the model.
        hidden_dim: hidden width of an expert.
        bandwidth: of the network, bytes per second.
        flops: of a rank, floating-point operations per second.
        matrices: weights of an expert; 2 for a plain MLP, 3 for SwiGLU.
        value_bytes: bytes of a weight and of an activation.
    """

    window: int = field(default=0, init=False, repr=False)

    dim: int
    hidden_dim: int
    bandwidth: float = 50e9 / 8
    flops: float = 11.5e12
    matrices: int = 2
    value_bytes: int = 4

    def plan(
        self,
        load_RE: Int[np.ndarray, "R E"],
        owner_E: Int[np.ndarray, " E"],
        history_WE: Int[np.ndarray, "W E"] | None = None,
    ) -> Plan:
        """Plan one step; ``history_WE`` is not read. Fails: UserError for loads and owners that do not fit."""
        load_RE, owner_E = checked(load_RE, owner_E)
        num_ranks = load_RE.shape[0]
        plan = native_plan(load_RE.sum(0), owner_E, num_ranks)
        shadowed = self.shadowed(load_RE.sum(0)) if num_ranks > 1 else []
        everyone = list(range(num_ranks))
        for expert in shadowed:
            plan.segments[expert] = nearest(load_RE[:, expert].tolist(), everyone, ranks_per_node=num_ranks)
        owners = owner_E.tolist()
        plan.transfers.extend(
            Transfer(expert, owners[expert], rank)
            for expert in sorted(shadowed)
            for rank in everyone
            if rank != owners[expert]
        )
        return plan

    def shadowed(self, load_E: Int[np.ndarray, " E"]) -> list[int]:
        """The experts to shadow, heaviest first; equal loads go by id. Fails: UserError for settings not positive."""
        positive = min(self.dim, self.hidden_dim, self.bandwidth, self.flops, self.matrices, self.value_bytes) > 0
        require(positive, "Widths, bandwidth, flops, matrices and value_bytes must be positive.")
        weights = self.matrices * self.dim * self.hidden_dim
        compute = 2 * weights / self.flops  # seconds per row, forward; backward costs twice as much
        message = self.dim * self.value_bytes / self.bandwidth  # seconds per row; four messages in a step
        broadcast = weights * self.value_bytes / self.bandwidth
        order = np.argsort(-load_E, kind="stable").tolist()
        per_row = 3 * compute + 4 * message
        latencies = [per_row * int(load_E[expert]) + count * broadcast for count, expert in enumerate(order)]
        count = 0
        while count + 1 < len(order) and latencies[count + 1] < latencies[count]:
            count += 1
        return order[:count]
