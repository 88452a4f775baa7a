"""Made-up loads with the traits of real ones: Zipf's skew, drift, domains that take turns, affinity between layers.

A token walks through the layers: with probability ``affinity`` its experts in the next layer are the partners of those
it has, else they are drawn from the popularity of the window's domain, which drifts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from equipoise.diagnosis.trace import Trace, from_routing
from equipoise.errors import require


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What to make up."""

    layers: int = 4
    """Layers."""
    num_experts: int = 64
    """Experts per layer."""
    top_k: int = 2
    """Experts per token."""
    windows: int = 8
    """Windows."""
    tokens: int = 4096
    """Tokens per window."""
    zipf: float = 0.8
    """Popularity of the n-th expert is n to the power of minus this; 0 for none."""
    drift: float = 0.05
    """Standard deviation of what a window adds to every expert's log-popularity."""
    domains: int = 1
    """Domains, each with its own popular experts."""
    switch_every: int = 4
    """Windows until the next domain takes its turn."""
    affinity: float = 0.0
    """Probability that a token goes on to the partners of its experts."""
    seed: int = 0
    """Seed of everything that is drawn."""

    def __post_init__(self) -> None:
        """Fails: UserError for a number that makes no sense."""
        counts = {name: getattr(self, name) for name in ("layers", "num_experts", "windows", "tokens", "domains")}
        for name, value in (counts | {"top_k": self.top_k, "switch_every": self.switch_every}).items():
            require(value > 0, f"A workload's {name} must be above 0, not {value}.")
        require(self.top_k <= self.num_experts, f"top_k must be at most {self.num_experts}, not {self.top_k}.")
        require(0 <= self.affinity <= 1, f"A workload's affinity must be from 0 to 1, not {self.affinity}.")
        spread = min(self.zipf, self.drift)
        require(spread >= 0, f"A workload's zipf and drift must be at least 0, not {spread}.")


def make_trace(workload: Workload) -> Trace:
    """Tokens that walk as the workload says, as a trace with single tokens."""
    draw = np.random.default_rng(workload.seed)
    W, T, L = workload.windows, workload.tokens, workload.layers
    popular_DLE = _popularity(workload, draw)
    partner_LE = np.array([draw.permutation(workload.num_experts) for _ in range(L)])
    domain_W = np.arange(W) // workload.switch_every % workload.domains
    walks = []
    for domain in domain_W:
        popular_DLE = popular_DLE + workload.drift * draw.standard_normal(popular_DLE.shape)
        walks.append(_walk(workload, popular_DLE[domain], partner_LE, draw))
    return from_routing(
        np.concatenate(walks).astype(np.int32),
        np.repeat(np.arange(W), T),
        workload.num_experts,
        domain_T=np.repeat(domain_W, T),
        domains=tuple(f"domain {number}" for number in range(workload.domains)),
        about={"source": "synthetic"},
    )


def make_loads(workload: Workload) -> Trace:
    """The same popularity without single tokens: rows are drawn by expert, which takes a moment for any size.

    A token may so have an expert twice, and affinity has no effect.
    """
    draw = np.random.default_rng(workload.seed)
    popular_DLE = _popularity(workload, draw)
    load = np.zeros((workload.windows, workload.layers, workload.num_experts), np.int64)
    for window in range(workload.windows):
        popular_DLE = popular_DLE + workload.drift * draw.standard_normal(popular_DLE.shape)
        share_LE = _share(popular_DLE[window // workload.switch_every % workload.domains])
        load[window] = draw.multinomial(workload.tokens * workload.top_k, share_LE)
    layers = tuple(str(layer) for layer in range(workload.layers))
    return Trace(load_WLE=load, layers=layers, top_k=workload.top_k, about={"source": "synthetic"})


def _popularity(workload: Workload, draw: np.random.Generator) -> Float[np.ndarray, "domains L E"]:
    """Logarithms; in every domain and layer other experts are popular."""
    rank = np.log(np.arange(1, workload.num_experts + 1))
    shape = (workload.domains, workload.layers, workload.num_experts)
    return -workload.zipf * draw.permuted(np.broadcast_to(rank, shape), axis=-1)


def _share(popular_LE: Float[np.ndarray, "L E"]) -> Float[np.ndarray, "L E"]:
    weight = np.exp(popular_LE - popular_LE.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def _walk(
    workload: Workload,
    popular_LE: Float[np.ndarray, "L E"],
    partner_LE: Int[np.ndarray, "L E"],
    draw: np.random.Generator,
) -> Int[np.ndarray, "T L K"]:
    T, K = workload.tokens, workload.top_k
    chosen = []
    for layer, popular_E in enumerate(popular_LE):
        # The K largest of log-popularity plus Gumbel noise are K draws without replacement.
        noisy_TE = popular_E + draw.gumbel(size=(T, workload.num_experts))
        drawn_TK = np.argpartition(-noisy_TE, K - 1, axis=1)[:, :K]
        follows_T = draw.random(T) < (workload.affinity if layer else 0.0)
        partners_TK = partner_LE[layer][chosen[-1]] if layer else drawn_TK
        chosen.append(np.where(follows_T[:, None], partners_TK, drawn_TK))
    return np.stack(chosen, axis=1)
