"""Selective Sinkhorn routing: now and then, a step routes by a balanced transport plan."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require
from equipoise.routing.keyed import new_key, normal, uniform
from equipoise.routing.selector import Selector
from equipoise.routing.top_k import TopK
from equipoise.routing.transport import costs_no_wait, sinkhorn

CHOICES = {"cost": ("softmax", "logits"), "noise_on": ("cost", "softmax", "none"), "grad": ("detach", "unroll")}


class SelectiveSinkhorn(Selector):
    """On a few training steps, drawn by coin, experts and weights are read from a balanced plan; else from the softmax.

    The plan P maximises ``<P, C> - xi sum P log P`` where rows sum to 1 and columns to T/E, T the call's real tokens. A
    token takes the K largest entries of its row, and these, made to sum to 1 for K > 1, are its weights. The coin is
    tossed once per layer and optimizer step. A plan looks at later tokens; evaluation uses none.

    Args:
        num_experts: E.
        probability: of a step that routes by the plan; 0 never does.
        xi: regularisation, at least 1e-6; small values make plans sharp, and take more iterations.
        tolerance: stop where the columns miss their sums by less, in the L2 norm; rows are exact.
        max_iterations: of Sinkhorn, at most.
        cost: C, the logits (``"logits"``), or their softmax (``"softmax"``), which for K > 1 spreads loads less than no
            plan where it is peaked: only a token's best experts differ in it.
        noise_on: what Gaussian noise is added to: C (``"cost"``), the logits of steps without plan (``"softmax"``), or
            nothing (``"none"``).
        noise_scale: its standard deviation.
        grad: through the plan: none (``"detach"``), so that the router learns nothing of the task on these steps, or
            through all iterations (``"unroll"``).

    Fails: UserError for settings out of range.
    Source: selective Sinkhorn routing (2511.08972), read second-hand. Differs: none known. INFERRED: the coin per step
    and layer, ``grad="detach"``, noise on the cost and off, the defaults of cost, xi, tolerance and max_iterations.
    """

    looks_ahead = True
    key: Tensor

    def __init__(
        self,
        num_experts: int,
        *,
        probability: float = 0.01,
        xi: float = 1.0,
        tolerance: float = 1e-4,
        max_iterations: int = 50,
        cost: str = "logits",
        noise_on: str = "cost",
        noise_scale: float = 0.0,
        grad: str = "detach",
    ):
        super().__init__(num_experts)
        require(0 <= probability <= 1, f"selective_sinkhorn.probability={probability} must lie between 0 and 1.")
        require(1e-6 <= xi < math.inf, f"selective_sinkhorn.xi={xi} must be at least 1e-6.")
        finite = 0 <= tolerance < math.inf
        require(finite, f"selective_sinkhorn.tolerance={tolerance} must be at least 0, and finite.")
        require(max_iterations >= 1, f"selective_sinkhorn.max_iterations={max_iterations} must be at least 1.")
        require(0 <= noise_scale < math.inf, f"selective_sinkhorn.noise_scale={noise_scale} must be at least 0.")
        for name, value in {"cost": cost, "noise_on": noise_on, "grad": grad}.items():
            known = ", ".join(CHOICES[name])
            require(value in CHOICES[name], f"selective_sinkhorn.{name}={value!r} is unknown; choose one of {known}.")
        self.probability, self.xi, self.tolerance, self.max_iterations = probability, xi, tolerance, max_iterations
        self.cost, self.noise_on, self.noise_scale, self.grad = cost, noise_on, noise_scale, grad
        self.token_choice = TopK(num_experts)
        self.register_buffer("key", new_key())

    def forward(self, call: Call, scores: Scores) -> Routing:
        """Choose the rows."""
        return self.token_choice(call, self._drawn(call, scores))

    def weigh(
        self, call: Call, scores: Scores, token_N: Int[Tensor, " N"], expert_N: Int[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """The combine weights of rows chosen by anyone: of the plan on its steps, else of the gate."""
        return super().weigh(call, self._drawn(call, scores), token_N, expert_N)

    def plan(self, call: Call, scores: Scores) -> Float[Tensor, "T E"]:
        """The balanced plan of this call; rows of padding are 0."""
        logit_TE = scores.logit_TE.detach() if self.grad == "detach" else scores.logit_TE
        cost_TE = logit_TE.softmax(-1) if self.cost == "softmax" else logit_TE
        if self.noise_on == "cost" and self.noise_scale:
            cost_TE = cost_TE + self._noise(call, cost_TE)
        plan = _detached_plan if self.grad == "detach" else _plan
        return plan(cost_TE / self.xi, call.mask_T, self.tolerance, self.max_iterations)

    def _drawn(self, call: Call, scores: Scores) -> Scores:
        """The scores with choice and gate of this step's branch; both are computed where looking would cost a wait."""
        if not call.training:
            return scores
        drawn = uniform(self.key, call.step, ()) < self.probability
        plain = self._noisy(call, scores)
        if costs_no_wait(drawn) and not drawn:
            return plain
        plan_TE = self.plan(call, scores)
        choice_TE = torch.where(drawn, plan_TE, plain.choice_TE)
        return replace(scores, gate_TE=torch.where(drawn, plan_TE, plain.gate_TE), choice_TE=choice_TE)

    def _noisy(self, call: Call, scores: Scores) -> Scores:
        """The scores of steps without plan."""
        if self.noise_on != "softmax" or not self.noise_scale:
            return scores
        noisy_TE = (scores.logit_TE + self._noise(call, scores.logit_TE)).softmax(-1)
        return replace(scores, gate_TE=noisy_TE, choice_TE=noisy_TE)

    def _noise(self, call: Call, like: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Gaussian noise that follows from the key, the step and the place in the call."""
        return (normal(self.key, call.step, tuple(like.shape), salt=1) * self.noise_scale).to(like.dtype)


def _plan(score_TE: Tensor, mask_T: Tensor | None, tolerance: float, max_iterations: int) -> Tensor:
    """The balanced plan of these scores, through which a gradient may go."""
    tokens = len(score_TE) if mask_T is None else mask_T.sum()

    def converged(before_E: Tensor, after_E: Tensor) -> Tensor:
        miss_E = torch.expm1(before_E.detach() - after_E.detach()) * (tokens / len(after_E))
        return miss_E.square().sum().sqrt() < tolerance

    f_T, g_E = sinkhorn(score_TE, mask_T, max_iterations, converged)
    return (score_TE + f_T[:, None] + g_E).exp()


@torch.library.custom_op("equipoise::detached_plan", mutates_args=())
def _detached_plan(score_TE: Tensor, mask_T: Tensor | None, tolerance: float, max_iterations: int) -> Tensor:
    """The plan without gradient; a step that the compiler does not look into, since it would unroll the loop."""
    return _plan(score_TE, mask_T, tolerance, max_iterations)


@_detached_plan.register_fake
def _(score_TE, mask_T, tolerance, max_iterations):
    return torch.empty_like(score_TE)
