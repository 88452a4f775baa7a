"""The policies by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from equipoise.errors import require
from equipoise.serving.costs import Costs
from equipoise.serving.direct import DirectRouter, Preble, RoundRobin, affinity, least_loaded, min_ttft
from equipoise.serving.dual_map import DualMap
from equipoise.serving.fleet import Fleet
from equipoise.serving.router import Router
from equipoise.serving.settings import DualMapSettings

Build = Callable[[Fleet, DualMapSettings], Router]

POLICIES: dict[str, Build] = {
    "dual_map": DualMap,
    "affinity": lambda fleet, _: DirectRouter(fleet, affinity),
    "least_loaded": lambda fleet, _: DirectRouter(fleet, least_loaded),
    "min_ttft": lambda fleet, _: DirectRouter(fleet, min_ttft),
    "round_robin": lambda fleet, _: DirectRouter(fleet, RoundRobin()),
    "preble": lambda fleet, _: DirectRouter(fleet, Preble()),
}


def build(policy: str, replicas: Sequence[str], costs: Costs, settings: DualMapSettings) -> Router:
    """A router of this policy for replicas of these costs. Fails: UserError for an unknown policy."""
    check_names([policy])
    fleet = Fleet(replicas, costs.cache_tokens, costs.block_tokens)
    return POLICIES[policy](fleet, replace(settings, prefill_seconds=costs.prefill_seconds))


def check_names(policies: Sequence[str]) -> None:
    """Fails: UserError for no policy, an unknown one, or one that comes twice."""
    require(len(policies) > 0, f"Name at least one policy; there are {', '.join(POLICIES)}.")
    for policy in policies:
        require(policy in POLICIES, f"There is no policy {policy!r}; there are {', '.join(POLICIES)}.")
    require(len(set(policies)) == len(policies), "A policy comes twice; name each once.")
