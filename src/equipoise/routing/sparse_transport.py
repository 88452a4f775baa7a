"""Sparsity-constrained transport: experts take their best tokens, after a price per token has spread them."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from torch import Tensor

from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import UserError, require
from equipoise.routing.expert_choice import EVALUATIONS
from equipoise.routing.rows import pack
from equipoise.routing.selector import Selector
from equipoise.routing.top_k import TopK

SOLVERS = ("adam", "lbfgs")
RATE, MOMENTUM, VARIANCE, EPSILON = 1e-2, 0.9, 0.999, 1e-8  # of Adam, as in the authors' router


class SparseTransport(Selector):
    """Every expert takes the C largest entries of its column of a plan with at most C entries per column.

    The plan P minimises ``-<P, softmax> + gamma/2 |P|^2`` where rows sum to 1, columns to T/E, and T counts the call's
    real tokens; ``C = ceil(T K factor / E)``, rounded up. It is found through a price per token, by ascent on the
    semi-dual (see ``semi_dual``): columns are exact, rows nearly. Entries that the plan leaves at 0 fill a column in
    the order of softmax plus price. Weights are the softmax. A token may be taken by any number of experts, also by
    none, and which ones depends on the other tokens of the call, later ones included.

    Args:
        num_experts: E.
        capacity_factor: of C.
        multiple: C is rounded up to a multiple of this.
        gamma: of the quadratic term; small values make plans sparse.
        solver: ``"adam"`` takes ``steps`` steps from price 0; ``"lbfgs"`` solves to the end, on the CPU.
        steps: of Adam.
        evaluation: what evaluation does. ``"refuse"`` raises; ``"top_k"`` routes every token by itself by the softmax;
            ``"as_trained"`` lets experts choose, right only for models that see the whole sequence anyway.

    Fails: UserError for settings out of range, and in evaluation where no fall-back is named.
    Source: Liu et al. 2022 (2209.15466) and its authors' vision router, with its 20 steps of Adam at 1e-2, gamma 1 and
    multiples of 4. Differs: K is a factor of C; entries at 0 are ranked, not taken by position; one plan per call.
    """

    causal = False
    looks_ahead = True

    def __init__(
        self,
        num_experts: int,
        *,
        capacity_factor: float = 1.0,
        multiple: int = 4,
        gamma: float = 1.0,
        solver: str = "adam",
        steps: int = 20,
        evaluation: str = "refuse",
    ):
        super().__init__(num_experts, renormalize=False)
        kept = 0 < capacity_factor < math.inf
        require(kept, f"sparse_transport.capacity_factor={capacity_factor} is no factor; give a positive number.")
        require(multiple >= 1, f"sparse_transport.multiple={multiple} must be at least 1.")
        require(0 < gamma < math.inf, f"sparse_transport.gamma={gamma} must be positive.")
        require(steps >= 0, f"sparse_transport.steps={steps} must be at least 0.")
        require(solver in SOLVERS, f"sparse_transport.solver={solver!r} is unknown; choose 'adam' or 'lbfgs'.")
        known = ", ".join(EVALUATIONS)
        require(evaluation in EVALUATIONS, f"evaluation={evaluation!r} is unknown; choose one of {known}.")
        self.capacity_factor, self.multiple, self.gamma = capacity_factor, multiple, gamma
        self.solver, self.steps, self.evaluation = solver, steps, evaluation
        self.token_choice = TopK(num_experts, renormalize=False)

    def forward(self, call: Call, scores: Scores) -> Routing:
        """Choose the rows."""
        if not call.training and self.evaluation == "refuse":
            raise UserError(
                "sparse_transport looks at later tokens, so evaluating it left to right would be wrong; name a "
                "fall-back: evaluation='top_k' (--set sparse_transport.evaluation=top_k) routes every token by itself, "
                "'as_trained' is for bidirectional models."
            )
        if not call.training and self.evaluation == "top_k":
            return self.token_choice(call, scores)
        num_experts = scores.choice_TE.shape[1]
        kept_C = self._kept(call, num_experts)
        similarity_ET = scores.choice_TE.detach().T.contiguous()
        if call.mask_T is not None:
            similarity_ET = similarity_ET.masked_fill(~call.mask_T, -torch.inf)
        priced_ET = similarity_ET + self.prices(call, similarity_ET, kept_C)
        token_EC, order_EC = priced_ET.topk(len(kept_C), dim=-1).indices.sort(dim=-1)
        expert_E1 = torch.arange(num_experts, device=token_EC.device)[:, None]
        expert_EC = torch.where(kept_C[order_EC], expert_E1, num_experts)
        token_N, expert_N = token_EC.reshape(-1), expert_EC.reshape(-1)
        return pack(scores, token_N, expert_N, self.weigh(call, scores, token_N, expert_N))

    @torch.no_grad()
    def prices(
        self, call: Call, similarity_ET: Float[Tensor, "E T"], kept_C: Bool[Tensor, " C"]
    ) -> Float[Tensor, " T"]:
        """The price of every token; high where few experts want it."""
        real_T = torch.ones_like(similarity_ET[0]) if call.mask_T is None else call.mask_T.to(similarity_ET.dtype)
        if not len(real_T):
            return real_T
        if self.solver == "lbfgs":
            return _exact_prices(similarity_ET, real_T, kept_C, self.gamma)
        return _adam_prices(similarity_ET, real_T, kept_C, self.gamma, self.steps)

    def num_rows(self, num_tokens: int, num_experts: int, k: int) -> int:
        """N = E*C, with the capacity that the call would have without padding."""
        share = math.ceil(num_tokens * k * self.capacity_factor / num_experts - 1e-9)
        return num_experts * min(num_tokens, -(-share // self.multiple) * self.multiple)

    def planned_rows(self, num_experts: int, k: int) -> float:
        """Rows per token that true experts compute where no token is taken by all: K times the factor."""
        return min(k * self.capacity_factor, num_experts)

    def refuse(self, k: int) -> None:
        """Any K will do: it says how many tokens an expert takes on average, not how many experts a token has."""

    def _kept(self, call: Call, num_experts: int) -> Bool[Tensor, " C"]:
        """True for the places of a column that the real tokens fill."""
        num_tokens = call.x_TD.shape[0]
        capacity = self.num_rows(num_tokens, num_experts, call.k) // num_experts
        tokens = call.tokens()
        share = (tokens.double() * call.k * self.capacity_factor / num_experts - 1e-9).ceil()
        rounded = (share / self.multiple).ceil() * self.multiple
        return torch.arange(capacity, device=tokens.device) < torch.minimum(rounded, tokens)


def sparse_plan(
    price_T: Float[Tensor, " T"],
    similarity_ET: Float[Tensor, "E T"],
    mass: Float[Tensor, ""],
    kept_C: Bool[Tensor, " C"],
    gamma: float,
) -> tuple[Int[Tensor, "E C"], Float[Tensor, "E C"], Float[Tensor, "E C"]]:
    """Each expert's best tokens, what they score with their prices, and their share of the plan.

    A column ``s = similarity + price`` is cut to its C largest entries and projected to ``max(s - tau, 0) / gamma``,
    with the tau that makes it sum to ``mass``.
    """
    priced_EC, token_EC = _largest(similarity_ET + price_T, len(kept_C))
    priced_EC = priced_EC.masked_fill(~kept_C, -torch.inf)
    count_C = torch.arange(1, len(kept_C) + 1, device=price_T.device)
    tau_EC = (priced_EC.cumsum(-1) - gamma * mass) / count_C
    last_E1 = (priced_EC > tau_EC).sum(-1, keepdim=True).clamp(min=1) - 1
    over_EC = (priced_EC - tau_EC.gather(1, last_E1)).nan_to_num(0)  # NaN in a call of padding alone
    return token_EC, priced_EC, over_EC.clamp(min=0) / gamma


def semi_dual(
    price_T: Float[Tensor, " T"],
    similarity_ET: Float[Tensor, "E T"],
    real_T: Float[Tensor, " T"],
    kept_C: Bool[Tensor, " C"],
    gamma: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, " T"]]:
    """The concave function of the tokens' prices whose maximum bounds the least cost from below, and its gradient.

    The value is ``sum_t price_t - sum_e (<s_e, P_e> - gamma/2 |P_e|^2)`` with the plan P of these prices, its gradient
    1 less the sums of the plan's rows.

    Args:
        similarity_ET: the negative cost; minus infinity for padding.
        real_T: 1 for a real token, 0 for padding.
        kept_C: True for the places that a column may fill.
    Source: Liu et al. 2022 (2209.15466), semi-dual with the squared 2-norm. Differs: marginals 1 and T/E, where theirs
    are 1/T and 1/E and gamma is T times as large.
    """
    mass = real_T.sum() / len(similarity_ET)
    token_EC, priced_EC, plan_EC = sparse_plan(price_T, similarity_ET, mass, kept_C, gamma)
    covered_T = torch.zeros_like(price_T).index_add(0, token_EC.reshape(-1), plan_EC.reshape(-1))
    gain = (priced_EC.masked_fill(plan_EC == 0, 0) * plan_EC - gamma / 2 * plan_EC.square()).sum()
    return (price_T * real_T).sum() - gain, real_T - covered_T


@torch.library.custom_op("equipoise::largest", mutates_args=())
def _largest(score_ET: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Each row's largest entries in descending order, and where they stand."""
    found = score_ET.topk(count, dim=-1)
    return found.values, found.indices


@_largest.register_kernel("cpu")
def _(score_ET, count):
    """By numpy, which takes a third of torch's time."""
    score = score_ET.numpy()
    index = np.argpartition(score, score.shape[1] - count, axis=1)[:, score.shape[1] - count :]
    order = np.argsort(-np.take_along_axis(score, index, axis=1), axis=1)
    index = np.take_along_axis(index, order, axis=1)
    return torch.from_numpy(np.take_along_axis(score, index, axis=1)), torch.from_numpy(index)


@_largest.register_fake
def _(score_ET, count):
    value_EC = score_ET.new_empty(len(score_ET), count)
    return value_EC, value_EC.long()


@torch.library.custom_op("equipoise::adam_prices", mutates_args=())
def _adam_prices(similarity_ET: Tensor, real_T: Tensor, kept_C: Tensor, gamma: float, steps: int) -> Tensor:
    """The prices after this many steps of Adam; one step to the compiler, which would unroll the loop."""
    price_T, mean_T, square_T = (torch.zeros_like(real_T) for _ in range(3))
    for step in range(1, steps + 1):
        gradient_T = semi_dual(price_T, similarity_ET, real_T, kept_C, gamma)[1]
        mean_T.lerp_(gradient_T, 1 - MOMENTUM)
        square_T.lerp_(gradient_T.square(), 1 - VARIANCE)
        spread_T = (square_T / (1 - VARIANCE**step)).sqrt_().add_(EPSILON)
        price_T.addcdiv_(mean_T, spread_T, value=RATE / (1 - MOMENTUM**step))
    return price_T


@_adam_prices.register_fake
def _(similarity_ET, real_T, kept_C, gamma, steps):
    return torch.empty_like(real_T)


@torch.library.custom_op("equipoise::exact_prices", mutates_args=())
def _exact_prices(similarity_ET: Tensor, real_T: Tensor, kept_C: Tensor, gamma: float) -> Tensor:
    """The prices of highest semi-dual, by L-BFGS on the CPU in fp64; a step that the compiler does not look into."""
    given = similarity_ET.double().cpu(), real_T.double().cpu(), kept_C.cpu(), gamma

    def cost(price: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient_T = semi_dual(torch.from_numpy(price), *given)
        return -value.item(), -gradient_T.numpy()

    found = minimize(cost, np.zeros(len(real_T)), jac=True, method="L-BFGS-B", tol=1e-9, options={"maxiter": 500})
    return torch.from_numpy(found.x).to(real_T)


@_exact_prices.register_fake
def _(similarity_ET, real_T, kept_C, gamma):
    return torch.empty_like(real_T)
