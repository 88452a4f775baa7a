"""What a rank compiles. Here, since the typed import hook of the tests would break the graph."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from equipoise import attach
from laws.cases import WRAPPERS, Make, counts_of, loss_of, router_gradient, tokens
from ranks.pool import named


class Recording(nn.Module):
    """Layers of all these methods in a row, each output kept as an alias, as people do to look at it."""

    def __init__(self, make: Make, methods: list[str]):
        super().__init__()
        self.layers = nn.ModuleList([make(method, seed=seed) for seed, method in enumerate(methods)])
        self.seen: list[Tensor] = []
        self.wrap = "plain"

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        seen = []
        for layer in self.layers:
            y = WRAPPERS[self.wrap](layer, x, mask)
            seen.append(y.flatten(0, 1))
            x = y
        self.seen = seen
        return x


def eager(model: nn.Module, backend: str) -> nn.Module:
    return model


def compiled(model: nn.Module, backend: str) -> Callable[..., Tensor]:
    return torch.compile(model, backend=backend, fullgraph=True)


def checkpointed(model: nn.Module, backend: str) -> Callable[..., Tensor]:
    """A checkpoint around what was compiled."""
    inner = compiled(model, backend)
    return lambda x, mask: checkpoint(inner, x, mask, use_reentrant=False)


def checkpointing(model: nn.Module, backend: str) -> Callable[..., Tensor]:
    """A checkpoint around every layer inside what is compiled."""
    model.wrap = "non_reentrant"
    return compiled(model, backend)


Way = Callable[..., Callable[..., Tensor]]
WAYS: dict[str, Way] = {
    "eager": eager,
    "compiled": compiled,
    "checkpointed": checkpointed,
    "checkpointing": checkpointing,
}


def compare(rank: int, make: str, methods: list[str], way: str, backend: str, backward: int = 1) -> list[dict] | None:
    """One step, eager and in the given way: what each left behind. Only the first rank works."""
    torch.compiler.reset()  # each call may compile anew: dynamo gives up at the ninth graph of one function
    alone = dist.new_group([0])
    if rank:
        return None
    return [_step(WAYS[name], Recording(named(make), methods), alone, backend, backward) for name in ("eager", way)]


def _step(way: Way, model: Recording, group: Any, backend: str, backward: int) -> dict[str, Any]:
    optimizer = SGD(model.parameters(), lr=1e-2)
    handle = attach(model, optimizer, group)
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(3)) < 0.8
    with (
        warnings.catch_warnings(),
        torch._functorch.config.patch(donated_buffer=backward == 1),  # else torch refuses a second backward
        torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True),  # else checkpoints break graphs
    ):
        warnings.simplefilter("ignore")  # of the compiler about its own parts
        y = way(model, backend)(tokens(3, 5), mask)
        loss = handle.follow(loss_of(y, mask)) * 0.5
        for left in reversed(range(backward)):
            loss.backward(retain_graph=bool(left))
    gradients = [router_gradient(layer) for layer in model.layers]
    optimizer.step()
    counts = [counts_of(layer.window.last) for layer in model.layers]
    return {"y": y.detach(), "seen": [s.detach() for s in model.seen], "gradients": gradients, "counts": counts}
