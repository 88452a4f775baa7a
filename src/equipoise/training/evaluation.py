"""Validation: the loss, and which experts which domain uses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from equipoise.balancing.balanced import balanced_layers
from equipoise.balancing.load_stats import LoadStats
from equipoise.models.decoder import loss


@dataclass(frozen=True)
class Evaluation:
    """What one pass over the validation text shows.

    Attributes:
        loss: nats per token.
        domain_load: rows by layer, ``[domains, E]``.
        domains: the domains' names.
    """

    loss: float
    domain_load: dict[str, Int[Tensor, "domains E"]]
    domains: tuple[str, ...]

    def per_layer(self) -> list[dict[str, Any]]:
        """One record per layer, as ``results.json`` has them."""
        return [self._layer(name, load_GE) for name, load_GE in self.domain_load.items()]

    def _layer(self, name: str, load_GE: Tensor) -> dict[str, Any]:
        stats = LoadStats.of(load_GE.sum(0))
        return {
            "name": name,
            "load": stats.load.tolist(),
            "max_vio": stats.max_vio,
            "load_cv": stats.cv,
            "load_entropy": stats.entropy,
            "dead_experts": stats.dead,
            "specialisation": specialisation(load_GE),
            "domain_load": dict(zip(self.domains, load_GE.tolist())),
        }


def specialisation(load_GE: Int[Tensor, "G E"]) -> float:
    """How much an expert tells of a row's domain: mutual information over the domains' entropy, 0 to 1.

    Args:
        load_GE: rows of each domain on each expert.
    """
    joint_GE = load_GE.double() / load_GE.sum().clamp(min=1)
    domain_G, expert_E = joint_GE.sum(1), joint_GE.sum(0)
    entropy = float(torch.special.entr(domain_G).sum())
    information = entropy + float(torch.special.entr(expert_E).sum() - torch.special.entr(joint_GE).sum())
    return min(1.0, max(0.0, information / entropy)) if entropy > 1e-12 else 0.0


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    domains: tuple[str, ...],
    device: torch.device,
    precision: AbstractContextManager,
) -> Evaluation:
    """Run the model over validation batches, every token routed by itself.

    Args:
        batches: tokens and their domains, each ``[B, S+1]``.
        precision: the autocast context of training.
    Fails: UserError for a method that refuses evaluation; NonFiniteError.
    """
    was_training = model.training
    model.eval()
    layers = balanced_layers(model)
    load = {name: torch.zeros(len(domains), layer.num_experts, dtype=torch.int64) for name, layer in layers.items()}
    total, count = 0.0, 0
    for token_BS, domain_BS in batches:
        token_BS = token_BS.to(device)
        with precision:
            batch_loss = loss(model(token_BS[:, :-1]), token_BS[:, 1:])
        total, count = total + float(batch_loss) * domain_BS[:, 1:].numel(), count + domain_BS[:, 1:].numel()
        domain_T = domain_BS[:, :-1].reshape(-1).long()
        for name, layer in layers.items():
            assert layer.routing is not None
            _add(load[name], domain_T, layer.routing.token_N.cpu(), layer.routing.expert_N.cpu())
    model.train(was_training)
    return Evaluation(total / count if count else math.nan, load, domains)


def _add(load_GE: Tensor, domain_T: Tensor, token_N: Tensor, expert_N: Tensor) -> None:
    """Count the rows of each domain on each expert; rows without use have expert id E."""
    num_experts = load_GE.shape[1]
    used_N = expert_N < num_experts
    index_N = domain_T[token_N[used_N]] * num_experts + expert_N[used_N]
    load_GE += torch.bincount(index_N, minlength=load_GE.numel()).view_as(load_GE)
