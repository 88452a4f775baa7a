"""The expert-router coupling (ERC) loss: a router row must excite its own expert most, and the expert its own row."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from equipoise.balancing.balancer import Balancer
from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import UserError, require
from equipoise.routing.keyed import new_key, uniform

ELEMENTS = 2**24  # of [experts, E, F] that are in memory at once


class Erc(Balancer):
    """``1/E^2 sum_i sum_{j != i} relu(M_ij - alpha M_ii) + relu(M_ji - alpha M_ii)``; 0 is coupled, no token is read.

    ``M_ij = |R~_i W_j|`` is how much expert j's gate projection (before the activation) answers to router row i, which
    is blurred within half its distance to the next row: ``R~_i = R_i * delta_i``, ``delta_i`` uniform in
    ``1 -+ min_j |R_i - R_j| / (2 |R_i|)``. The noise follows from the optimizer step alone, so every micro-batch and
    rank has the same value; as each is scaled like the training loss, the loss counts once per step.

    Args:
        num_experts: E.
        alpha: how far an expert may answer to foreign rows, as a share of its answer to its own.
        weight: of the loss.
        noise: blur the rows.

    Fails: UserError where the experts have no ``gate_up``.
    Source: Lv et al., "Coupling experts and routers in Mixture-of-Experts via an auxiliary loss" (2512.23447).
    Differs: |R_i| is kept above 1e-12; where an answer is 0 its gradient is 0; a call without tokens has no loss.
    """

    key: Tensor

    def __init__(self, num_experts: int, *, alpha: float = 1.0, weight: float = 1.0, noise: bool = True):
        super().__init__()
        require(0 <= alpha < math.inf, f"erc.alpha={alpha} is no share; give a number of at least 0, usually up to 1.")
        require(0 <= weight < math.inf, f"erc.weight={weight} is no weight; give a number of at least 0.")
        self.alpha, self.weight, self.noise = alpha, weight, noise
        self.register_buffer("key", new_key())

    def loss(self, call: Call, scores: Scores, routing: Routing) -> Tensor:
        """The scalar loss."""
        gate_up: Any = getattr(call.experts, "gate_up", None)
        if gate_up is None:
            raise UserError("erc compares router rows with the experts' gate_up, and these experts have none.")
        if not call.x_TD.shape[0]:  # nor may a step without a call gather sharded parameters
            return scores.prob_TE.sum()
        router: Any = call.router
        router_ED = router.weight.to(torch.promote_types(router.weight.dtype, torch.float32))
        if self.noise:
            router_ED = router_ED * self.blur(router_ED.detach(), call.step)
        kind = router_ED.device.type
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):  # autocast does not know meta tensors
            answer_EE = answers(router_ED, gate_up[:, : gate_up.shape[1] // 2])
        return coupling(answer_EE, self.alpha) * (call.tokens() > 0)

    def blur(self, router_ED: Float[Tensor, "E D"], step: Tensor) -> Float[Tensor, "E D"]:
        """The factors ``delta``, which leave every row nearest to itself."""
        distance_EE = torch.cdist(router_ED, router_ED, compute_mode="donot_use_mm_for_euclid_dist")
        nearest_E = distance_EE.fill_diagonal_(torch.inf).amin(1).nan_to_num(posinf=0)  # one expert has no neighbour
        radius_E = nearest_E / (2 * router_ED.norm(dim=1).clamp(min=1e-12))
        uniform_ED = uniform(self.key, step, tuple(router_ED.shape)).to(router_ED.dtype)
        return 1 + radius_E[:, None] * (2 * uniform_ED - 1)


def coupling(answer_EE: Float[Tensor, "E E"], alpha: float) -> Float[Tensor, ""]:
    """The loss of the answers ``M``: ``M_ij`` is that of expert j to row i."""
    own_E1 = alpha * answer_EE.diagonal()[:, None]
    excess_EE = (answer_EE - own_E1).relu() + (answer_EE.T - own_E1).relu()
    return (excess_EE - excess_EE.diagonal().diag()).mean()


def answers(router_ED: Float[Tensor, "E D"], gate_EFD: Float[Tensor, "E F D"]) -> Float[Tensor, "E E"]:
    """``M_ij = |R_i W_j|``, without ever holding all ``[E, E, F]``."""
    return _Answers.apply(router_ED, gate_EFD)  # type: ignore[return-value] # torch leaves apply untyped


class _Answers(torch.autograd.Function):
    """The projections are computed again in the backward pass, some experts at a time."""

    @staticmethod
    def forward(ctx: Any, router_ED: Tensor, gate_EFD: Tensor) -> Tensor:
        pieces = [(router_ED @ gate.to(router_ED.dtype).mT).norm(dim=-1) for gate in gate_EFD.split(_step(gate_EFD))]
        answer_EE = torch.cat(pieces).T.contiguous()
        ctx.save_for_backward(router_ED, gate_EFD, answer_EE)
        return answer_EE

    @staticmethod
    def backward(ctx: Any, grad_EE: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        router_ED, gate_EFD, answer_EE = ctx.saved_tensors
        share_EE = (grad_EE / answer_EE.clamp(min=torch.finfo(answer_EE.dtype).tiny)).T  # by expert, then row
        grad_router_ED, grad_gates = torch.zeros_like(router_ED), []
        step = _step(gate_EFD)
        for gate, share in zip(gate_EFD.split(step), share_EE.split(step)):
            gate_eFD = gate.to(router_ED.dtype)
            slope_eEF = share[:, :, None] * (router_ED @ gate_eFD.mT)
            grad_router_ED = grad_router_ED + (slope_eEF @ gate_eFD).sum(0)
            grad_gates.append((slope_eEF.mT @ router_ED).to(gate.dtype))
        return grad_router_ED, torch.cat(grad_gates)


def _step(gate_EFD: Tensor) -> int:
    """Experts that are computed at once."""
    return max(1, ELEMENTS // (gate_EFD.shape[0] * gate_EFD.shape[1]))
