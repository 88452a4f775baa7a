"""SwiGLU experts with fused weights, and the dense form that shared experts and dense layers use.

All experts lie in two parameters, so every expert is in every graph: one without tokens gets a gradient of zeros, and
neither DDP nor FSDP waits for it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.contracts import Routing
from equipoise.errors import require
from equipoise.kernels.chooser import choose, refuse_unknown
from equipoise.kernels.swiglu import swiglu


class SwiGLU(nn.Module):
    """E experts ``x -> down(silu(gate x) * up x)`` without biases.

    Args:
        dim: D, width of the model.
        hidden_dim: F, hidden width of one expert.
        num_experts: E.
        kernel: ``"auto"`` or a key of ``equipoise.kernels.KERNELS``.

    Attributes:
        gate_up: ``[E, 2F, D]``, the gate's rows first (the layout of transformers' ``gate_up_proj``).
        down: ``[E, D, F]``.
        kernel_used: the kernel of the last call; None before it.
    """

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, kernel: str = "auto"):
        super().__init__()
        refuse_unknown(kernel)
        self.kernel = kernel
        self.kernel_used: str | None = None
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * hidden_dim, dim).normal_(std=dim**-0.5))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim).normal_(std=hidden_dim**-0.5))

    def forward(self, x: Float[Tensor, "*batch D"], routing: Routing) -> Float[Tensor, "*batch D"]:
        """Compute the routed rows and return, per token, the weighted sum of its experts' answers."""
        gate_up, down = self.gate_up, self.down
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
        same = x.dtype == gate_up.dtype
        require(same, f"The tokens are {x.dtype}, but the experts {gate_up.dtype}; convert one of them with .to().")
        self.kernel_used = kernel = choose(self.kernel, x.dtype, (*gate_up.shape[1:], down.shape[2]))
        end_E = routing.load_E[: gate_up.shape[0]].cumsum(0)  # null experts stand behind the true ones
        return swiglu(x, routing.token_N, routing.weight_N, gate_up, down, end_E, kernel)[0]


class DenseSwiGLU(nn.Module):
    """One SwiGLU feed-forward that every token passes: a shared expert, or a dense layer."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """``down(silu(gate x) * up x)``."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
