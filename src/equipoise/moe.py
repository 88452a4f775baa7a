"""The layer: score, adjust, select, tap, compute, add the shared experts."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from equipoise.balancing.balanced import BalancedLayer
from equipoise.balancing.tap import tap
from equipoise.balancing.z_loss import ZLoss
from equipoise.building import build
from equipoise.errors import require
from equipoise.experts.nulls import identity
from equipoise.experts.swiglu import DenseSwiGLU, SwiGLU
from equipoise.methods import find


class MoE(BalancedLayer):
    """A sparse Mixture-of-Experts feed-forward layer whose experts a named method keeps evenly used.

    Args:
        dim: D, width of the model.
        hidden_dim: F, hidden width of each expert.
        num_experts: E, routed experts.
        top_k: K, experts per token; or K by step, as ``{0: 8, 1000: 1}``.
        method: a key of ``equipoise.METHODS``.
        shared_experts: experts that every token passes, beside the routed ones.
        z_loss: weight of the router z-loss; 0 leaves it out.
        kernel: ``"auto"``, ``"grouped_mm"``, ``"loop"`` or ``"naive"``.
        settings: of the method's parts, as ``rate=1e-3`` or ``**{"bias.rate": 1e-3}``.

    Attributes:
        settings: of the method's parts as resolved, by ``"part.setting"``.

    Fails: UserError for impossible sizes, an unknown method, setting or kernel.
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int | Mapping[int, int],
        method: str = "global_batch",
        shared_experts: int = 0,
        z_loss: float = 0.0,
        kernel: str = "auto",
        **settings: Any,
    ):
        require(isinstance(method, str), f"method={method!r} must be a name, such as 'global_batch'.")
        require(type(z_loss) in (int, float), f"z_loss={z_loss!r} must be a number of at least 0.")
        _check(dim=dim, hidden_dim=hidden_dim, num_experts=num_experts, shared_experts=shared_experts)
        scorer, selector, balancers, resolved = build(find(method), num_experts, settings)
        if z_loss:
            balancers["z_loss"] = ZLoss(num_experts, weight=z_loss)
        experts = SwiGLU(dim, hidden_dim, num_experts, kernel)
        super().__init__(scorer.make_router(dim), scorer, selector, balancers, experts, top_k)
        self.shared = DenseSwiGLU(dim, shared_experts * hidden_dim) if shared_experts else None
        self.method, self.settings = method, resolved

    def extra_repr(self) -> str:
        """The sizes and the method, for ``print``."""
        dim, hidden_dim = self.experts.down.shape[1:]
        settings = "".join(f", {name}={value}" for name, value in self.settings.items())
        sizes = f"dim={dim}, hidden_dim={hidden_dim}, num_experts={self.num_experts}, top_k={self.top_k}"
        return f"{sizes}, method={self.method}{settings}"

    def forward(
        self, x: Float[Tensor, "*batch D"], mask: Bool[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch D"]:
        """Send every token through its experts.

        Args:
            x: ``[..., D]``.
            mask: ``[...]``, True for a real token; padding is routed and counted nowhere, and answered with zeros.
        Returns:
            ``[..., D]``.
        Fails: UserError for a wrong width or mask; NonFiniteError for NaN or infinite logits, on the CPU (elsewhere
            looking would cost a wait: ``logit_total`` is not finite then).
        """
        call = self.call(x, mask)
        scores = self.scorer(call)
        self.refuse_nonfinite(scores)
        for balancer in self.balancers.values():
            scores = balancer.adjust(call, scores)
        routing = self.choose(call, scores)
        if self.training and torch.is_grad_enabled():
            losses, statistics = self.losses(call, scores, routing), self.statistics(call, scores, routing)
            routing = tap(self.window, routing, losses, statistics)
        tokens = call.x_TD.view(x.shape)
        y = self.experts(tokens, routing)
        if self.selector.identity:
            y = y + identity(tokens, routing, self.num_experts).to(y.dtype)  # which autocast may have chosen
        if self.shared is not None:
            y = y + self.shared(tokens)
        self.routing = routing.detach()
        return y


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        least = 0 if name == "shared_experts" else 1
        require(
            type(size) is int and size >= least,
            f"{name}={size!r} is impossible; give a whole number, {least} or more.",
        )
