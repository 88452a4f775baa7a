"""What Ray Serve's router can be told, checked before anything is deployed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from equipoise.errors import UserError, require
from equipoise.serving.fleet import Fleet
from equipoise.serving.policies import POLICIES, check_names
from equipoise.serving.prompts import PromptReader
from equipoise.serving.router import Router
from equipoise.serving.settings import DualMapSettings

try:
    from ray.serve.config import RequestRouterConfig
except ImportError as error:
    raise UserError("Routing in Ray Serve needs Ray: pip install 'equipoise[serve]'.") from error


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """Options of a router in Ray Serve."""

    policy: str = "dual_map"
    """A name of `equipoise.serving.POLICIES`."""
    block_tokens: int = PromptReader.block_tokens
    """Tokens per block of a replica's prefix cache."""
    bytes_per_token: float = PromptReader.bytes_per_token
    """UTF-8 bytes per token of the model's tokenizer, on average."""
    cache_tokens: int = 1_000_000
    """Tokens that a replica's prefix cache keeps."""
    patience: float = 60.0
    """Seconds after which a replica that owes an answer and sends nothing is given up."""
    down_wait: float = 1.0
    """Seconds that a request waits while no replica is there, before it fails with 503."""
    dual_map: DualMapSettings = field(default_factory=DualMapSettings)
    """Settings of the policy, such as ``slo`` and ``prefill_seconds``; those of this class in a flat mapping."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> RouterOptions:
        """From a flat mapping, as Ray hands it over. Fails: UserError for an unknown option or a value not allowed."""
        own = {item.name for item in fields(cls)} - {"dual_map"}
        known = own | {item.name for item in fields(DualMapSettings)}
        for name in options:
            require(name in known, f"A router has no option {name!r}; there are {', '.join(sorted(known))}.")
        settings = DualMapSettings(**{name: value for name, value in options.items() if name not in own})
        return cls(**{name: value for name, value in options.items() if name in own}, dual_map=settings)

    def __post_init__(self) -> None:
        """Fails: UserError at the first value that is not allowed."""
        check_names([self.policy])
        self.build(["any"])
        self.reader()
        require(self.down_wait >= 0, f"down_wait must be at least 0 s, not {self.down_wait}.")

    def build(self, replicas: list[str]) -> Router:
        """The policy for these replicas."""
        fleet = Fleet(replicas, self.cache_tokens, self.block_tokens, self.patience)
        return POLICIES[self.policy](fleet, self.dual_map)

    def reader(self) -> PromptReader:
        """What reads the prompts of calls."""
        return PromptReader(block_tokens=self.block_tokens, bytes_per_token=self.bytes_per_token)


def router_config(stats_seconds: float = 0.5, **options: Any) -> RequestRouterConfig:
    """What a deployment's ``request_router_config`` is to be, for a policy of ours.

    Args:
        stats_seconds: how often each replica's ``record_routing_stats`` is called.
        options: of `RouterOptions` and, in the same place, of `DualMapSettings`; ``policy`` is dual_map if not given.
    Fails: UserError for an unknown option or a value that is not allowed. Ray itself finds out only when it routes.
    """
    policy = RouterOptions.of(options).policy
    name = "DualMapRouter" if policy == "dual_map" else "PolicyRouter"
    values: dict[str, Any] = {
        "request_router_class": f"equipoise.serving.ray_router.{name}",
        "request_router_kwargs": options,
        "request_routing_stats_period_s": stats_seconds,
    }
    return RequestRouterConfig(**values)
