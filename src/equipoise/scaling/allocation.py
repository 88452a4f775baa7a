"""How to spend a budget on a Mixture-of-Experts: size, tokens, number of experts, granularity."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from equipoise.errors import UserError, require
from equipoise.scaling.bootstrap import Interval, interval_of
from equipoise.scaling.form import Form

SIZES = np.geomspace(1e3, 1e15, 1441)  # 120 sizes per factor of ten; a parabola through three of them does the rest
WEIGHTS_OF_A_LAYER = 12  # parameters of a decoder layer of width d: 12 d^2
FEWEST_TOKENS = 1.0


@dataclass(frozen=True)
class Optimum:
    """What to train for a budget.

    Attributes:
        flops: the budget.
        params: active parameters.
        tokens: training tokens.
        loss: what to expect, nats per token.
        intervals: of ``params``, ``tokens`` and ``loss``.
        total: parameters in all; None for a law without experts, as are the following.
        experts: routed experts in one layer, all of them.
        granularity: how many times narrower an expert is than the dense feed-forward.
        at_edge: which of ``experts`` and ``granularity`` is the largest or smallest candidate, so that the best one may
            lie beyond.
    """

    flops: float
    params: float
    tokens: float
    loss: float
    intervals: Mapping[str, Interval]
    total: float | None = None
    experts: int | None = None
    granularity: float | None = None
    at_edge: tuple[str, ...] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The expert models to choose among: every number of experts with every granularity.

    A model with E experts of granularity G has G * E experts of 1/G the width, of which a token visits G * top_k: its
    size stays, its router grows.

    Attributes:
        experts: numbers of experts before they are made finer, each at least ``top_k``.
        granularities: how many times finer.
        top_k: experts per token before they are made finer.
        expert_share: share of the active parameters that lies in experts.
        max_total: parameters that fit into memory; None for no limit.
        router_flops: training FLOPs per router weight and token.
        aspect: width over number of layers.

    Source: the cost of routing follows Krajewski et al. 2024 (arXiv 2402.07871), section 5: per token and layer
    12 d^2 c_f + d E G c_r. Differs: c_r = 14 and the aspect of 64 are their values as remembered (INFERRED).
    """

    experts: tuple[int, ...]
    granularities: tuple[float, ...] = (1.0,)
    top_k: int = 1
    expert_share: float = 2 / 3
    max_total: float | None = None
    router_flops: float = 14.0
    aspect: float = 64.0

    def check(self) -> None:
        """Fails: UserError at the first value that is not allowed."""
        require(bool(self.experts) and bool(self.granularities), "Give at least one number of experts and granularity.")
        fewest = min(self.experts)
        require(0 < self.top_k <= fewest, f"top_k must be from 1 to the fewest experts ({fewest}), not {self.top_k}.")
        require(min(self.granularities) > 0, f"Granularities must be above 0, not {min(self.granularities)}.")
        share = self.expert_share
        require(0 < share <= 1, f"expert_share must be above 0 and at most 1, not {share}.")
        require(self.router_flops >= 0, f"router_flops must be at least 0, not {self.router_flops}.")
        require(self.aspect > 0, f"aspect must be above 0, not {self.aspect}.")

    def total(self, params: Float[np.ndarray, " S"], experts: int) -> Float[np.ndarray, " S"]:
        """Parameters in all of models with so many active ones."""
        return params * (1 - self.expert_share + self.expert_share * experts / self.top_k)

    def flops_per_product(
        self, params: Float[np.ndarray, " S"], experts: int, granularity: float, base: float
    ) -> Float[np.ndarray, " S"]:
        """Training FLOPs per active parameter and token, routing included; ``base`` without it."""
        width = np.cbrt(self.aspect * params / WEIGHTS_OF_A_LAYER)
        return base + self.router_flops * experts * granularity / (WEIGHTS_OF_A_LAYER * width)


def best_expert_model(
    form: Form,
    parameters: Float[np.ndarray, "R P"],
    flops: float,
    flops_per_product: float,
    candidates: Candidates,
    confidence: float,
) -> Optimum:
    """The candidate, size and tokens with the lowest loss for a budget.

    Args:
        form: the law's.
        parameters: the estimate first, then its draws, which give the intervals.
        flops: the budget.
        flops_per_product: training FLOPs per active parameter and token, without routing.
        candidates: to choose among.
        confidence: share of the intervals.

    Fails: UserError where no candidate fits the budget and ``max_total``.
    """
    candidates.check()
    shapes = list(itertools.product(sorted(candidates.experts), sorted(candidates.granularities)))
    found = [_best_sizes(form, parameters, flops, flops_per_product, candidates, shape) for shape in shapes]
    loss, sizes, tokens = map(np.array, zip(*found))
    if not np.isfinite(loss[:, 0]).any():
        raise UserError(f"No candidate fits {flops:g} FLOPs and max_total; raise max_total or offer fewer experts.")
    choice = loss.argmin(0)
    each = np.arange(len(parameters))
    best = {"params": sizes[choice, each], "tokens": tokens[choice, each], "loss": loss[choice, each]}
    experts, granularity = shapes[choice[0]]
    return Optimum(
        flops=flops,
        **{name: float(values[0]) for name, values in best.items()},
        intervals={name: interval_of(values[1:], confidence) for name, values in best.items()},
        total=float(candidates.total(best["params"][:1], experts)[0]),
        experts=round(experts * granularity),
        granularity=granularity,
        at_edge=_edges(candidates, experts, granularity),
    )


def _best_sizes(
    form: Form,
    parameters: Float[np.ndarray, "R P"],
    flops: float,
    base: float,
    candidates: Candidates,
    shape: tuple[int, float],
) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """Loss, size and tokens of a candidate at its best size, for every set of parameters; loss inf if none fits."""
    experts, granularity = shape
    total = candidates.total(SIZES, experts)
    tokens = flops / (SIZES * candidates.flops_per_product(SIZES, experts, granularity, base))
    values = {"params": SIZES, "tokens": tokens, "total": total, "density": SIZES / total}
    values["granularity"] = np.full_like(SIZES, granularity)
    fits = (tokens >= FEWEST_TOKENS) & (total <= (candidates.max_total or np.inf))
    loss = np.where(fits, form.loss(parameters, values), np.inf)
    place = loss.argmin(1)
    shift, best = _vertex(loss, place)
    step = np.log(SIZES[1] / SIZES[0])
    sizes = SIZES[place] * np.exp(shift * step)
    slope = np.gradient(np.log(tokens), step)[place]  # tokens fall nearly as 1 / size
    return best, sizes, tokens[place] * np.exp(slope * shift * step)


def _vertex(
    loss: Float[np.ndarray, "R S"], place: np.ndarray
) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """Where between the sizes, in steps, the parabola through the best and its neighbours is lowest, and its value."""
    rows, last = np.arange(len(loss)), loss.shape[1] - 1
    here = loss[rows, place]
    before, after = loss[rows, np.maximum(place - 1, 0)], loss[rows, np.minimum(place + 1, last)]
    inside = (place > 0) & (place < last) & np.isfinite(before) & np.isfinite(after)
    before, after = np.where(inside, before, here), np.where(inside, after, here)
    with np.errstate(invalid="ignore"):  # nothing fits: all three are infinite
        rise, bend = after - before, before - 2 * here + after
    shift = np.where(bend > 0, -rise / (2 * np.where(bend > 0, bend, 1)), 0.0)
    return shift, here + np.where(bend > 0, rise * shift / 4, 0.0)


def _edges(candidates: Candidates, experts: int, granularity: float) -> tuple[str, ...]:
    """The choices that stand at an end of what was offered."""
    offered = {"experts": (candidates.experts, experts), "granularity": (candidates.granularities, granularity)}
    return tuple(name for name, (all_, one) in offered.items() if len(all_) > 1 and one in (min(all_), max(all_)))
