"""How the laws build, feed and read a layer of any method; which method is exempt from which law, and why."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from equipoise import METHODS, Handle, MoE, attach
from equipoise.balancing.balancer import Balancer
from equipoise.building import defaults

D, F, E, K = 7, 3, 5, 2
SETTINGS: dict[str, dict[str, Any]] = {"expert_choice": {"evaluation": "top_k"}}  # without it, it refuses evaluation
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-12},
    torch.float32: {"rtol": 0.0, "atol": 0.0},  # persistent state: bit for bit
    torch.int64: {"rtol": 0.0, "atol": 0.0},
    torch.bool: {"rtol": 0.0, "atol": 0.0},
}

# What a method defines per call, so that a split into other calls is another value. The laws of splits read this.
PER_CALL = {
    "switch": "its loss counts the loads of one micro-batch on one rank, by definition",
    "expert_choice": "its experts choose among the tokens of one call, by definition",
}
FORMULAS: dict[str, Callable[..., Tensor]] = {}  # a balancer's loss once more, from a layer and its logits
EXEMPTIONS = {  # (method, "test_file.test_name"): reason
    ("expert_choice", "test_counting.test_accumulation_counts_and_learns_as_one_batch"): PER_CALL["expert_choice"],
    ("expert_choice", "test_foreign_loops.test_uneven_token_sums_equal_one_batch"): PER_CALL["expert_choice"],
    ("expert_choice", "test_losses.test_mirrored_layers_score_badly"): "its loads are equal by construction",
    ("expert_choice", "test_state.test_all_tokens_to_one_expert"): "its loads are equal by construction",
    ("global_batch", "test_ranks.test_a_rank_without_a_micro_batch"): "every backward pass counts over all ranks",
}

for path in sorted(Path(__file__).parent.glob("methods_*.py")):  # what groups of methods say of themselves
    about = importlib.import_module(f"laws.{path.stem}")
    SETTINGS |= about.SETTINGS
    EXEMPTIONS |= about.EXEMPTIONS
    PER_CALL |= vars(about).get("PER_CALL", {})
    FORMULAS |= vars(about).get("FORMULAS", {})

Make = Callable[..., MoE]


def build(method: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> MoE:
    """A layer with a z-loss, whose selection state is not zero: zeros would hide what should not depend on it."""
    torch.manual_seed(seed)
    sizes = {"dim": D, "hidden_dim": F, "num_experts": E, "top_k": K, "z_loss": 0.1}
    layer = MoE(method=method, **{**sizes, **SETTINGS.get(method, {}), **changes}).to(dtype)
    for buffer in layer.balancers.buffers():
        if buffer.dim():  # one number chooses no expert
            buffer.copy_(0.1 * torch.randn(buffer.shape))
    return layer


def no_own_loss(method: str) -> dict[str, Any]:
    """The settings that take a method's own losses away, and leave the z-loss, which is a mean over tokens."""
    return {name: 0.0 for name in defaults(METHODS[method]) if name.endswith((".weight", ".start"))}


def moves_choice(balancer: Balancer) -> bool:
    """Whether the balancer takes part in the choice; the others have a loss only."""
    return type(balancer).adjust is not Balancer.adjust


def router_gradient(layer: MoE) -> Tensor:
    """The gradient of the router's weight, of all ranks; zeros where it learns by counts, and is no parameter."""
    weight = layer.router.weight
    gradient = weight.grad if weight.requires_grad else torch.zeros_like(weight)
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


def quiet(method: str) -> dict[str, Any]:
    """The settings that take a method's noise away, where it has some, which is drawn by an expert's place."""
    return {name: False for name in defaults(METHODS[method]) if name.endswith(".noise")}


def tight(method: str) -> dict[str, Any]:
    """The settings under which a method drops rows, where it can."""
    return {"capacity_factor": 0.7} if METHODS[method].selector == "top_k" else {}


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Reproducible tokens ``[*shape, D]``."""
    return torch.randn(*shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(y: Tensor, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """A training loss that is a mean (0 without tokens) or a sum over the real tokens."""
    loss_T = y.square().sum(-1)[... if mask is None else mask]
    return loss_T.sum() / (max(1, loss_T.numel()) if reduction == "mean" else 1)


@dataclass
class Run:
    """A layer in training."""

    layer: MoE
    optimizer: torch.optim.Optimizer = field(init=False)
    handle: Handle = field(init=False)

    def __post_init__(self):
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=1e-2)
        self.handle = attach(self.layer, self.optimizer)

    def backward(self, x: Tensor, mask: Tensor | None = None, share: float = 1.0, wrap: str = "plain") -> Tensor:
        """One micro-batch, whose loss the loop scales by ``share``; returns the output."""
        y = WRAPPERS[wrap](self.layer, x, mask)
        (self.handle.follow(loss_of(y, mask)) * share).backward()
        return y

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def counts(self) -> dict[str, Tensor]:
        """The whole numbers of the open window, but not how many calls they came in."""
        return counts_of(self.layer.window.sums)

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.layer.named_parameters() if p.grad is not None}

    def state(self) -> dict[str, Tensor]:
        return state_of(self.layer)


def counts_of(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole numbers among a window's sums, but not how many calls they came in."""
    return {k: v.clone() for k, v in sums.items() if not v.is_floating_point() and k != "calls"}


def state_of(layer: MoE) -> dict[str, Tensor]:
    """All that lasts and is not trained."""
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def same(actual: Any, expected: Any) -> None:
    """Tensors, or dictionaries of them, are equal: exactly, but for fp64 and its rounding."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            same(actual[key], expected[key])
        return
    torch.testing.assert_close(actual, expected, equal_nan=False, **TOLERANCE[expected.dtype])


def differ(actual: Tensor, expected: Tensor) -> bool:
    """The tensors are further apart than rounding: the guard of a law that compares two runs."""
    return not torch.allclose(actual, expected, **TOLERANCE[expected.dtype])


def _plain(layer: MoE, x: Tensor, mask: Tensor | None) -> Tensor:
    return layer(x, mask)


def _nested(layer: MoE, x: Tensor, mask: Tensor | None) -> Tensor:
    inner = partial(checkpoint, layer, use_reentrant=False)
    return checkpoint(inner, x, mask, use_reentrant=True)


def _offloaded(layer: MoE, x: Tensor, mask: Tensor | None) -> Tensor:
    with save_on_cpu():
        return layer(x, mask)


# What loops put around a layer. None of it may change a gradient or a count.
WRAPPERS: dict[str, Callable[[MoE, Tensor, Tensor | None], Tensor]] = {
    "plain": _plain,
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non_reentrant": partial(checkpoint, use_reentrant=False),
    "nested": _nested,
    "offloaded": _offloaded,
}


def parametrize(metafunc: Any) -> None:
    """Run a law that takes ``method`` for every method that is not exempt from it."""
    if "method" in metafunc.fixturenames:
        law = f"{metafunc.module.__name__}.{metafunc.function.__name__}"
        metafunc.parametrize("method", [name for name in METHODS if (name, law) not in EXEMPTIONS])
