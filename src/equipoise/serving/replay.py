"""Replay requests through several policies, and say what each was worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool

from equipoise.errors import require
from equipoise.serving.costs import Costs
from equipoise.serving.dual_map import DualMap
from equipoise.serving.faults import Fault, check_faults
from equipoise.serving.policies import POLICIES, build, check_names
from equipoise.serving.request import Request, check_order, check_sizes
from equipoise.serving.router import Router
from equipoise.serving.settings import DualMapSettings
from equipoise.serving.simulator import Outcome, Simulator, replica_name

Results = dict[str, Any]
DIGITS = 6  # significant digits in results
WINDOWS = 40  # of the arrival times


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """How requests are replayed.

    Attributes:
        slo: wanted time to first token, s.
        speed: 2 sends the requests twice as fast as they came.
        warmup: first requests that fill the caches and are not measured.
        routers: that share the requests and do not talk to each other.
        faults: what happens to replicas.
        costs: of a replica.
        dual_map: options of the policy ``dual_map``; its ``slo`` and ``prefill_seconds`` are taken from here.
    """

    slo: float = 5.0
    speed: float = 1.0
    warmup: int = 0
    routers: int = 1
    faults: tuple[Fault, ...] = ()
    costs: Costs = field(default_factory=Costs)
    dual_map: DualMapSettings = field(default_factory=DualMapSettings)

    def __post_init__(self) -> None:
        """Fails: UserError for a value that is not allowed."""
        require(0 < self.slo < float("inf"), f"slo must be seconds above 0, not {self.slo}.")
        require(0 < self.speed < float("inf"), f"speed must be above 0, not {self.speed}.")
        require(self.warmup >= 0, f"warmup must be at least 0, not {self.warmup}.")
        require(self.routers > 0, f"routers must be at least 1, not {self.routers}.")


def replay(
    requests: Sequence[Request],
    policies: Sequence[str] = tuple(POLICIES),
    replicas: int = 8,
    settings: ReplaySettings | None = None,
    on_progress: Callable[[str, int], None] | None = None,
) -> Results:
    """Replay requests through every policy, on equal simulated replicas.

    Args:
        requests: by arrival.
        policies: names; ``equipoise.serving.POLICIES`` has them all.
        replicas: how many.
        settings: speed, SLO, costs and faults.
        on_progress: called with a policy and its number of finished requests now and then.
    Returns: ``settings``, and per policy in ``policies``: ``capacity``, the share of requests whose time to first token
        is within the SLO; ``goodput``, such requests per second; ``hit_rate``, the share of prompt tokens found in
        caches, and ``hit_rate_bound``, the same with one endless cache for all; ``ttft_p50``, ``ttft_p90``,
        ``ttft_p99``, s; ``load_cv``, standard deviation of the replicas' waiting prompt tokens over their mean,
        averaged over time. Beside them what the router did: ``moved`` waiting requests, ``retried`` after a fault,
        ``router_ms`` per request, ``entries`` of its prefix memory at most; and for pictures ``ttft_percentiles``, 0 to
        100, s, and ``capacity_over_time``, the capacity of each fortieth of the arrival times, None where none arrived.
    Fails: UserError for no requests, times that go backwards, a request larger than a replica, no replicas, an unknown
        policy or replica, or when all replicas are down.
    """
    settings = settings or ReplaySettings()
    _check(requests, policies, replicas, settings)
    sent = [
        replace(request, id=place, arrival=request.arrival / settings.speed) for place, request in enumerate(requests)
    ]
    bound = hit_tokens_bound(sent, settings.costs.block_tokens)
    found = {}
    names = [replica_name(number) for number in range(replicas)]
    for policy in policies:
        options = replace(settings.dual_map, slo=settings.slo)
        routers = [build(policy, names, settings.costs, options) for _ in range(settings.routers)]
        progress = None if on_progress is None else lambda done, policy=policy: on_progress(policy, done)
        outcome = Simulator(routers, sent, settings.costs, settings.faults, progress).run()
        found[policy] = measured(sent, outcome, settings, bound) | _router_facts(routers, outcome, len(sent))
    return {"settings": _facts(sent, replicas, settings), "policies": found}


def _check(requests: Sequence[Request], policies: Sequence[str], replicas: int, settings: ReplaySettings) -> None:
    require(replicas > 0, f"replicas must be at least 1, not {replicas}.")
    check_names(policies)
    check_order(requests)
    check_sizes(requests, settings.costs.kv_tokens)
    check_faults(settings.faults, replicas)
    require(settings.warmup < len(requests), f"All {len(requests)} requests are warm-up; measure at least one.")


def rate(requests: Sequence[Request]) -> float:
    """Requests per second between the first and the last arrival. Fails: UserError where all arrive at once."""
    span = requests[-1].arrival - requests[0].arrival
    require(span > 0, "All requests arrive at once, so they have no rate; do not give one.")
    return (len(requests) - 1) / span


def hit_tokens_bound(requests: Sequence[Request], block_tokens: int) -> list[int]:
    """Per request, the prompt tokens that came before in any request: what one endless, instant cache would find."""
    seen: set[int] = set()
    bound = []
    for request in requests:
        known = next((place for place, block in enumerate(request.blocks) if block not in seen), len(request.blocks))
        bound.append(min(known * block_tokens, request.input_tokens - 1))
        seen.update(request.blocks[known:])
    return bound


def measured(requests: Sequence[Request], outcome: Outcome, settings: ReplaySettings, bound: list[int]) -> Results:
    """What one policy was worth, as `replay` says; without what its router did."""
    first = settings.warmup
    counted = requests[first:]
    ttft = np.array(outcome.ttft[first:])
    tokens = sum(request.input_tokens for request in counted)
    within = int((ttft <= settings.slo).sum())
    span = counted[-1].arrival - counted[0].arrival
    p50, p90, p99 = np.percentile(ttft, (50, 90, 99))
    values = {
        "capacity": within / len(counted),
        "goodput": within / span if span else float(within),
        "hit_rate": sum(outcome.hit_tokens[first:]) / tokens,
        "hit_rate_bound": sum(bound[first:]) / tokens,
        "ttft_p50": p50,
        "ttft_p90": p90,
        "ttft_p99": p99,
        "load_cv": float(np.mean(outcome.load_cv)) if outcome.load_cv else 0.0,
    }
    percentiles = np.percentile(ttft, range(101))
    return {name: _rounded(value) for name, value in values.items()} | {
        "ttft_percentiles": [_rounded(value) for value in percentiles],
        "capacity_over_time": _over_time(counted, ttft <= settings.slo),
    }


def _over_time(counted: Sequence[Request], within: Bool[np.ndarray, " N"]) -> list[float | None]:
    arrivals = np.array([request.arrival for request in counted])
    edges = np.linspace(arrivals[0], arrivals[-1], WINDOWS + 1)
    window = np.clip(np.searchsorted(edges, arrivals, side="right") - 1, 0, WINDOWS - 1)
    count, good = (np.bincount(window, weights, WINDOWS) for weights in (None, within))
    return [_rounded(part / whole) if whole else None for part, whole in zip(good, count)]


def _router_facts(routers: Sequence[Router], outcome: Outcome, count: int) -> Results:
    return {
        "moved": sum(router.moved for router in routers if isinstance(router, DualMap)),
        "retried": outcome.retried,
        "router_ms": _rounded(1000 * outcome.router_seconds / count),
        "entries": outcome.most_entries,
    }


def _facts(requests: Sequence[Request], replicas: int, settings: ReplaySettings) -> Results:
    """The settings, as they were used."""
    return asdict(settings) | {
        "requests": len(requests),
        "replicas": replicas,
        "requests_per_second": _rounded(rate(requests)) if requests[-1].arrival > requests[0].arrival else None,
        "dual_map": asdict(
            replace(settings.dual_map, slo=settings.slo, prefill_seconds=settings.costs.prefill_seconds)
        ),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
