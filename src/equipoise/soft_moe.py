"""Soft MoE: experts compute mixtures of tokens, so nothing is chosen, dropped or unbalanced; not for causal models."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from equipoise.balancing.balanced import refuse_wrong_input
from equipoise.contracts import Routing
from equipoise.errors import UserError, require
from equipoise.experts.swiglu import SwiGLU

EVALUATIONS = ("refuse", "as_trained")


class SoftMoE(nn.Module):
    """Every expert computes p slots per sequence; a slot is a mean of the sequence's tokens, an output a mean of slots.

    ``logit = norm(x) (scale * norm(phi))``, of which a softmax over the tokens makes each slot's input, and a softmax
    over the slots each token's output. Loads are equal and there is no loss, no state and nothing to attach. A token's
    output depends on all tokens of its sequence, later ones included, in evaluation as in training: right for encoders
    of images or whole texts and for diffusion, never for a model that generates left to right, for which there is no
    fall-back.

    Args:
        dim: D, width of the model.
        hidden_dim: F, hidden width of each expert.
        num_experts: E.
        slots_per_expert: p; E*p slots in place of S*K rows.
        normalize: the logits are cosines times a learned scale; False takes the plain product.
        evaluation: ``"refuse"`` raises; ``"as_trained"`` says that the model sees whole sequences when it is used.
        kernel: ``"auto"``, ``"grouped_mm"``, ``"loop"`` or ``"naive"``.

    Attributes:
        phi: ``[D, E*p]``, one column per slot, an expert's slots side by side.
        scale: ``[1]`` (FSDP2 shards no scalars), learned, 1 at first; None without ``normalize``.
        experts: the routed experts.

    Fails: UserError for impossible sizes, an unknown evaluation or kernel.
    Source: Puigcerver et al. 2023 (2308.00951), its dispatch, combine and normalisation. Differs: experts are SwiGLU
    without biases; padding is in no mixture, and is answered with zeros.
    """

    causal = False

    def __init__(
        self,
        *,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        slots_per_expert: int = 1,
        normalize: bool = True,
        evaluation: str = "refuse",
        kernel: str = "auto",
    ):
        super().__init__()
        sizes = {"dim": dim, "hidden_dim": hidden_dim, "num_experts": num_experts, "slots_per_expert": slots_per_expert}
        for name, size in sizes.items():
            require(type(size) is int and size >= 1, f"{name}={size!r} is impossible; give a whole number, 1 or more.")
        require(evaluation in EVALUATIONS, f"evaluation={evaluation!r} is unknown; choose 'refuse' or 'as_trained'.")
        self.num_experts, self.slots_per_expert, self.evaluation = num_experts, slots_per_expert, evaluation
        self.phi = nn.Parameter(torch.empty(dim, num_experts * slots_per_expert).normal_(std=dim**-0.5))
        self.scale = nn.Parameter(torch.ones(1)) if normalize else None
        self.experts = SwiGLU(dim, hidden_dim, num_experts, kernel)

    def forward(
        self, x: Float[Tensor, "*batch S D"], mask: Bool[Tensor, "*batch S"] | None = None
    ) -> Float[Tensor, "*batch S D"]:
        """Mix, compute, mix back.

        Args:
            x: ``[..., S, D]``; each leading index is a sequence of its own.
            mask: ``[..., S]``, True for a real token.
        Returns:
            ``[..., S, D]``.
        Fails: UserError for a wrong width or mask, and where evaluation is refused.
        """
        refuse_wrong_input(x, mask, len(self.phi), "..., S")
        if not self.training and self.evaluation == "refuse":
            raise UserError(
                "SoftMoE mixes all tokens of a sequence, so evaluating it left to right would be wrong; "
                "evaluation='as_trained' says that the model sees whole sequences when it is used."
            )
        x_BSD = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
        mask_BS1 = None if mask is None else mask.reshape(*x_BSD.shape[:2], 1)
        if mask_BS1 is not None:
            x_BSD = x_BSD.masked_fill(~mask_BS1, 0)
        dispatch_BSP, combine_BSP = self.mixtures(x_BSD, mask_BS1)
        slot_BPD = dispatch_BSP.mT.to(x.dtype) @ x_BSD
        y_BSD = combine_BSP.to(x.dtype) @ self.compute(slot_BPD)
        if mask_BS1 is not None:
            y_BSD = y_BSD.masked_fill(~mask_BS1, 0)
        return y_BSD.reshape(x.shape)

    def mixtures(
        self, x_BSD: Float[Tensor, "B S D"], mask_BS1: Bool[Tensor, "B S 1"] | None
    ) -> tuple[Float[Tensor, "B S P"], Float[Tensor, "B S P"]]:
        """Each slot's shares of the tokens, which sum to 1 over S, and each token's of the P = E*p slots."""
        dtype = torch.promote_types(x_BSD.dtype, torch.float32)
        kind = "cpu" if x_BSD.device.type == "meta" else x_BSD.device.type  # autocast does not know meta tensors
        with torch.autocast(kind, enabled=False):
            token_BSD, phi_DP = x_BSD.to(dtype), self.phi.to(dtype)
            if self.scale is not None:
                token_BSD, phi_DP = F.normalize(token_BSD, dim=-1), self.scale.to(dtype) * F.normalize(phi_DP, dim=0)
            logit_BSP = token_BSD @ phi_DP
            # Not -inf: where a sequence is all padding, its zeros are mixed evenly, without NaN.
            lowest = torch.finfo(dtype).min
            real_BSP = logit_BSP if mask_BS1 is None else logit_BSP.masked_fill(~mask_BS1, lowest)
            return real_BSP.softmax(1), logit_BSP.softmax(2)

    def compute(self, slot_BPD: Float[Tensor, "B P D"]) -> Float[Tensor, "B P D"]:
        """Let each expert compute its slots: rows of a routing that nobody had to choose."""
        rows = slot_BPD.shape[0] * self.slots_per_expert  # of each expert
        slot_EBpD = slot_BPD.unflatten(1, (self.num_experts, self.slots_per_expert)).transpose(0, 1)
        row_N = torch.arange(self.num_experts * rows, device=slot_BPD.device)
        load_E = torch.full((self.num_experts,), rows, device=slot_BPD.device)
        one_N = torch.ones(len(row_N), dtype=torch.promote_types(slot_BPD.dtype, torch.float32), device=row_N.device)
        routing = Routing(row_N, row_N // max(1, rows), one_N, load_E, torch.zeros_like(load_E))
        return self.experts(slot_EBpD, routing).transpose(0, 1).flatten(1, 2)
