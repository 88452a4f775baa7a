"""How evenly each layer's experts are used."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from equipoise.balancing.balanced import BalancedLayer, balanced_layers
from equipoise.errors import UserError, require


@dataclass(frozen=True)
class LoadStats:
    """The balance of one layer over a batch.

    Attributes:
        load: rows selected for each expert, int64 ``[E]``.
        max_vio: (max load - mean load) / mean load; 0 is balanced.
        cv: standard deviation over mean.
        entropy: of the load's shares over ln E; 1 is balanced.
        dead: experts without a row.
        dropped: rows that found their expert full.
        loss: each balancing loss by name; the balance loss reads 1 when balanced.
        weighted_loss: the same times its weight: what is trained on.
        nulls: share of the rows that null experts got; ``load`` and all above are those of the true ones.
        readings: what the layer's parts tell of their state, as ``"part.name"``.
        scope: ``"window"``, the last optimizer step over all micro-batches and ranks, or ``"call"``, the last call.
    """

    load: Int[Tensor, " E"]
    max_vio: float
    cv: float
    entropy: float
    dead: int
    dropped: int = 0
    loss: dict[str, float] = field(default_factory=dict)
    weighted_loss: dict[str, float] = field(default_factory=dict)
    nulls: float = 0.0
    readings: dict[str, float] = field(default_factory=dict)
    scope: str = "call"

    @classmethod
    def of(
        cls,
        load_E: Int[Tensor, " E"],
        dropped: int = 0,
        loss: dict[str, tuple[float, float]] | None = None,
        scope: str = "call",
    ) -> LoadStats:
        """The balance of a load; one without rows reads as balanced, with every expert dead.

        Args:
            loss: (value, weighted value) by name.
        """
        load = load_E.detach().double().cpu()
        mean = float(load.mean())
        share = load / load.sum().clamp(min=1)
        return cls(
            load_E,
            max_vio=float(load.max()) / mean - 1 if mean else 0.0,
            cv=float(load.std(unbiased=False)) / mean if mean else 0.0,
            entropy=float(torch.special.entr(share).sum()) / math.log(len(load)) if mean and len(load) > 1 else 1.0,
            dead=int((load == 0).sum()),
            dropped=dropped,
            loss={name: value for name, (value, _) in (loss or {}).items()},
            weighted_loss={name: weighted for name, (_, weighted) in (loss or {}).items()},
            scope=scope,
        )


def load_stats(model: nn.Module) -> dict[str, LoadStats]:
    """The balance of every MoE layer: of the last step where a handle commits the counts, else of the last call.

    Fails: UserError where the model has no MoE layer, or one has not been called.
    """
    layers = balanced_layers(model)
    require(bool(layers), "The model has no MoE layer.")
    return {name: _of(name, layer) for name, layer in layers.items()}


def _of(name: str, layer: BalancedLayer) -> LoadStats:
    last = layer.window.last
    readings = {key: float(value) for key, value in layer.readings().items()}
    if last:
        tokens = max(1, int(last["tokens"]))
        values = {key: float(last[f"loss.{key}"]) / tokens for key in layer.balancers if f"loss.{key}" in last}
        loss = {key: (value, value * layer.balancers[key].weight) for key, value in values.items()}
        found = LoadStats.of(last["demand_E"][: layer.num_experts], int(last["dropped"]), loss, scope="window")
        return replace(found, nulls=_share(last["demand_E"], layer.num_experts), readings=readings)
    if layer.routing is None:
        name = name or type(layer).__name__
        raise UserError(f"Layer {name!r} has not been called yet, so it has no load.")
    demand_E = layer.routing.demand_E()
    found = LoadStats.of(demand_E[: layer.num_experts], int(layer.routing.dropped_E.sum()))
    return replace(found, nulls=_share(demand_E, layer.num_experts), readings=readings)


def _share(demand_E: Int[Tensor, " E"], num_experts: int) -> float:
    """The share of the rows that lie beyond the true experts."""
    return float(demand_E[num_experts:].sum() / demand_E.sum().clamp(min=1))
