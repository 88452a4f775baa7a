"""What the ranks run, and what they report: training steps of one layer. ``job(rank, ...)`` is called on all alike."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from equipoise import MoE, attach, load_stats
from laws.cases import WRAPPERS, counts_of, loss_of, router_gradient, state_of, tokens
from ranks.pool import named

Step = list[list[Tensor]]  # by rank, then by micro-batch: tokens
Report = dict[str, Any]


class Wrapped(nn.Module):
    """A model around one layer."""

    def __init__(self, layer: MoE, wrap: str):
        super().__init__()
        self.layer, self.wrap = layer, wrap

    def forward(self, x: Tensor) -> Tensor:
        return WRAPPERS[self.wrap](self.layer, x, None)


def train(rank: int, layer: MoE, model: Callable[..., Tensor], steps: list[Step], sync: bool = True) -> list[Report]:
    """Train on token sums, so that ranks and micro-batches of any size are one batch; report on every step.

    Args:
        model: the layer, or what DDP makes of it.
        sync: average gradients, and broadcast buffers, in every micro-batch, not in the last one only.
    """
    optimizer, reports = SGD(layer.parameters(), lr=1e-2), []
    handle = attach(layer, optimizer)
    for step in steps:
        total = sum(len(x) for micro in step for x in micro)
        optimizer.zero_grad()
        outputs = []
        for left, x in zip(reversed(range(len(step[rank]))), step[rank]):
            with nullcontext() if sync or not left else model.no_sync():
                outputs.append(model(x))
                loss = handle.follow(loss_of(outputs[-1], reduction="sum"), count=len(x))
                (loss * (len(step) / total)).backward()  # DDP takes the mean over ranks
        optimizer.step()
        reports.append({"outputs": torch.cat(outputs).detach(), **left_by_a_step(layer)})
    return reports


def left_by_a_step(layer: MoE) -> Report:
    """The router's gradient, the window that was committed, the state, and the losses that are read."""
    return {
        "gradient": router_gradient(layer),
        "counts": counts_of(layer.window.last),
        "state": state_of(layer),
        "loss": load_stats(layer)[""].loss,
    }


def train_ddp(
    rank: int, make: str, method: str, steps: list[Step], sync: bool = True, wrap: str = "plain"
) -> list[Report]:
    """DDP broadcasts buffers in every forward that synchronises; that is its default."""
    layer = named(make)(method)
    return train(rank, layer, DistributedDataParallel(Wrapped(layer, wrap)), steps, sync)


def train_sharded(rank: int, make: str, method: str, steps: list[Step]) -> list[Report]:
    """Under FSDP2: parameters and their gradients are split over the ranks, state is not."""
    layer = named(make)(method)
    fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return train(rank, layer, layer, steps)


def step_sharded(rank: int, make: str, method: str) -> dict[str, Tensor]:
    """A step under FSDP2 in which a layer saw no tokens on any rank, as of a modality that the batch lacks."""
    model = nn.ModuleList([named(make)(method), named(make)(method)])
    for layer in model:
        fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    handle = attach(model, ())
    handle.follow(loss_of(model[0](tokens(5)))).backward()
    handle.step()
    return state_of(model[1])


def train_in_groups(rank: int, make: str, method: str, steps: list[Step]) -> list[Tensor]:
    """One micro-batch per rank; what each rank commits where its group is itself alone, and where it is all ranks."""
    alone = [dist.new_group([other]) for other in range(dist.get_world_size())][rank]
    found = []
    for group in (alone, dist.group.WORLD):
        layer = named(make)(method)
        handle = attach(layer, (), group=group)
        handle.follow(loss_of(layer(steps[0][rank][0]))).backward()
        handle.step()
        found.append({"counts": counts_of(layer.window.last), "state": state_of(layer)})
    return found


def step_by_hand(rank: int, make: str, method: str, micro: list[Tensor]) -> dict[str, Tensor]:
    """The state after a step to which each rank came with its micro-batches, or with none. No DDP, which would wait."""
    layer = named(make)(method)
    handle = attach(layer, ())
    for x in micro[rank : rank + 1]:
        handle.follow(loss_of(layer(x))).backward()
    handle.step()
    return state_of(layer)


def fail_on(rank: int, culprit: int) -> None:
    """One rank fails while the others wait for it."""
    if rank == culprit:
        raise ValueError(f"planted on rank {rank}")
    dist.barrier()


def add_up(rank: int, value: int) -> int:
    """The sum of ``value + rank`` over the ranks."""
    total = torch.tensor(value + rank)
    dist.all_reduce(total)
    return int(total)
