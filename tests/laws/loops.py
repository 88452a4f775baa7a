"""The loops that people write, each one optimizer step on the same global batch: ``loop(layer, micro_batches)``.

The global batch is made of identical micro-batches, so that one router gradient and one set of counts is right for
every loop and every method, also for losses that are defined per micro-batch or run ahead of the batch.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from equipoise import MoE, attach
from laws.cases import WRAPPERS, Run, loss_of, tokens

MICRO_BATCHES = 3
Loop = Callable[[MoE, list[Tensor]], None]


def micro_batches() -> list[Tensor]:
    """15 tokens each: 15*K divides by E, so that an expert's choice among all of them is its choice in each."""
    return [tokens(3, 5) for _ in range(MICRO_BATCHES)]


def plain(layer: MoE, micro: list[Tensor]) -> None:
    """The loop that says what is right: one backward over the whole batch."""
    run = Run(layer)
    run.backward(torch.cat(micro))
    run.optimizer.step()


def accumulation(layer: MoE, micro: list[Tensor], wrap: str = "plain") -> None:
    run = Run(layer)
    for x in micro:
        run.backward(x.requires_grad_(wrap != "plain"), share=1 / len(micro), wrap=wrap)
    run.optimizer.step()


def token_sums(layer: MoE, micro: list[Tensor]) -> None:
    optimizer = SGD(layer.parameters(), lr=1e-2)
    handle = attach(layer, optimizer)
    total = sum(x[..., 0].numel() for x in micro)
    for x in micro:
        (handle.follow(loss_of(layer(x), reduction="sum"), count=x.shape[:-1].numel()) / total).backward()
    optimizer.step()


def scale_by_hand(layer: MoE, micro: list[Tensor]) -> None:
    """As in a pipeline stage that never sees the loss."""
    optimizer = SGD(layer.parameters(), lr=1e-2)
    handle = attach(layer, optimizer)
    handle.loss_scale = 1 / len(micro)
    for x in micro:
        (loss_of(layer(x)) / len(micro)).backward()
    optimizer.step()


def step_by_hand(layer: MoE, micro: list[Tensor]) -> None:
    """As with an optimizer that runs inside the backward pass, and has no step to hook."""
    handle = attach(layer, ())
    for x in micro:
        (handle.follow(loss_of(layer(x))) / len(micro)).backward()
    handle.step()


def closure(layer: MoE, micro: list[Tensor]) -> None:
    optimizer = SGD(layer.parameters(), lr=1e-2)
    handle = attach(layer, optimizer)

    def compute() -> Tensor:
        optimizer.zero_grad()
        loss = handle.follow(loss_of(layer(torch.cat(micro))))
        loss.backward()
        return loss

    optimizer.step(compute)


def two_optimizers(layer: MoE, micro: list[Tensor]) -> None:
    """One for the experts, one for the rest, if only for a gain; each zeroes its gradients at its own time."""
    experts = AdamW(layer.experts.parameters())
    layer.gain = torch.nn.Parameter(torch.ones(1))
    rest = SGD([p for name, p in layer.named_parameters() if not name.startswith("experts.")], lr=1e-2)
    handle = attach(layer, [rest, experts])
    rest.zero_grad()
    for x in micro:
        (handle.follow(loss_of(layer(x))) / len(micro)).backward()
    experts.step()
    experts.zero_grad()
    rest.step()


def grad_scaler(layer: MoE, micro: list[Tensor], fused: bool, overflows: bool) -> None:
    """Mixed precision's loop; where it overflows, on other data, the scaler must skip that step and go on."""
    optimizer = AdamW(layer.parameters(), lr=1e-2, fused=fused)
    handle, scaler = attach(layer, optimizer), torch.amp.GradScaler("cpu", init_scale=64.0)
    batches = [([tokens(2, 5, seed=8)], torch.inf)] if overflows else []
    for batch, factor in [*batches, (micro, 1.0)]:
        optimizer.zero_grad()
        for x in batch:
            loss = handle.follow(loss_of(layer(x))) * (factor / len(batch))
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == (32.0 if overflows else 64.0)


LOOPS: dict[str, Loop] = {
    "accumulation": accumulation,
    **{wrap: partial(accumulation, wrap=wrap) for wrap in WRAPPERS if wrap != "plain"},
    "token_sums": token_sums,
    "scale_by_hand": scale_by_hand,
    "step_by_hand": step_by_hand,
    "closure": closure,
    "two_optimizers": two_optimizers,
    "scaler": partial(grad_scaler, fused=False, overflows=False),
    "scaler_fused": partial(grad_scaler, fused=True, overflows=False),
    "scaler_skips": partial(grad_scaler, fused=False, overflows=True),
    "scaler_skips_fused": partial(grad_scaler, fused=True, overflows=True),
}
