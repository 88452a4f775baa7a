"""Loss-free balancing: a selection bias that steps against each expert's excess load."""

import math
import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancing.balancer import SelectionBias
from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require

RULES = ("sign", "linear", "rms")
POWER = {"constant": 0.0, "inverse_sqrt": 0.5, "inverse": 1.0}  # of 1/n, n counting the optimizer's steps


class Bias(SelectionBias):
    """``bias += rate / n^power * direction`` once per optimizer step, from that step's global load.

    With L the mean load, c the load and n the number of the step, the direction is ``sign(L - c)``, ``(L - c) / L``
    (``"linear"``), or ``L - c`` over the root of its mean square (``"rms"``).

    Every such step descends on the dual of giving each expert L rows, ``D(b) = sum_t (sum of the K best of s_t + b) -
    L sum_i b_i``, whose subgradient is ``c - L``. For a step d from loads c to c' on the same scores, convexity bounds
    it: ``<c - L, d> <= D(b + d) - D(b) <= <c' - L, d>``. Where the right side is positive the step may have raised D,
    and is counted as an overshoot.

    Args:
        num_experts: E.
        rate: the step; tied to the scale of the scores (sigmoid scores lie in [0, 1]).
        rule: ``"sign"``, ``"linear"`` or ``"rms"``: what the direction is.
        schedule: ``"constant"``, ``"inverse_sqrt"`` or ``"inverse"``: by which power of n the step shrinks.
        centre: take the mean off every step, so that biases stay near 0; it changes no choice, and nothing at all with
            ``"linear"`` and ``"rms"``, whose steps have no mean.
        alarm: warn once, when readings are read, where two biases lie this far apart; 0 never warns. At 1 a sigmoid
            score, which spans 1, decides no more between these two.

    Fails: UserError for an unknown rule or schedule, or a negative rate or alarm.
    Source: ``sign`` and ``linear``: Wang et al. 2024 (2408.15664), algorithm 1 and its raw-error variant. The dual and
    the schedules: Han and Zhong 2025 (2512.03915). Differs: ``linear`` is relative to the mean load, so that the rate
    depends on no batch size. INFERRED, since only its abstract was readable: the dual's step, ``rms`` and the
    schedules. The bound and the count of overshoots are ours.
    """

    last_step_E: Float[Tensor, " E"]
    overshoots: Int[Tensor, ""]

    def __init__(
        self,
        num_experts: int,
        *,
        rate: float = 1e-3,
        rule: str = "sign",
        schedule: str = "constant",
        centre: bool = False,
        alarm: float = 1.0,
    ):
        super().__init__(num_experts)
        require(0 <= rate < math.inf, f"bias.rate={rate} is no step; give a number of at least 0.")
        require(rule in RULES, f"bias.rule={rule!r} is unknown; choose one of {', '.join(RULES)}.")
        require(schedule in POWER, f"bias.schedule={schedule!r} is unknown; choose one of {', '.join(POWER)}.")
        require(0 <= alarm < math.inf, f"bias.alarm={alarm} is no distance; give a number above 0, or 0 for no alarm.")
        self.rate, self.rule, self.schedule, self.centre, self.alarm = rate, rule, schedule, centre, alarm
        self.register_buffer("last_step_E", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("overshoots", torch.zeros((), dtype=torch.int64))
        self.warned = False
        self.dual: Tensor | None = None

    def statistics(self, call: Call, scores: Scores, routing: Routing) -> dict[str, Tensor]:
        """The rows selected for each expert; with a schedule, the step times the rows; with a rule, the dual's sum."""
        demand_E = routing.demand_E()
        found = {"demand_E": demand_E}
        if self.schedule != "constant":
            found["step_rows"] = call.step * demand_E.sum()  # additive; over the rows it is the step again
        if self.rule != "sign":
            unused_N = routing.expert_N == len(demand_E)
            best_N = scores.choice_TE.detach()[routing.token_N, routing.expert_N.masked_fill(unused_N, 0)]
            found |= {"best": best_N.masked_fill(unused_N, 0).sum(), "tokens": call.tokens()}  # no second top-K
        return found

    def update(self, statistics: dict[str, Tensor]) -> None:
        """One step of the bias; it stands still where the loads are equal."""
        demand_E, dtype = statistics["demand_E"], self.bias_E.dtype
        rows = demand_E.sum()
        # In integers, the sum against E*load: a mean in floating point would call equal loads unequal.
        lack_E = rows - len(demand_E) * demand_E
        relative_E = lack_E.to(dtype) / rows.clamp(min=1)
        self._observe(statistics, relative_E)
        step_E = self.rate * self._direction(torch.sign(lack_E).to(dtype), relative_E)
        if self.schedule != "constant":
            number = statistics["step_rows"] // rows.clamp(min=1) + 1
            step_E = step_E / number.to(dtype) ** POWER[self.schedule]
        step_E = step_E - step_E.mean() if self.centre else step_E
        self.last_step_E.copy_(torch.where(lack_E.any(), step_E, self.last_step_E))
        self.bias_E += step_E

    def readings(self) -> dict[str, Tensor]:
        """``spread``: largest bias less smallest; ``overshoots``, of all steps so far; ``dual``: D over the tokens.

        The dual is that of the last step's rows under the bias that routed them, without those a capacity dropped. With
        groups or an override these rows are not each token's K best, and the reading is their sum, not D.
        There is none before the first step, and with the rule ``"sign"``.
        """
        spread = self.bias_E.max() - self.bias_E.min()
        if self.alarm and not self.warned and spread >= self.alarm:
            self.warned = True
            warnings.warn(_ALARM.format(alarm=self.alarm), stacklevel=2)
        dual = {} if self.dual is None else {"dual": self.dual}
        return {"spread": spread, "overshoots": self.overshoots.clone()} | dual

    def _direction(self, sign_E: Tensor, relative_E: Float[Tensor, " E"]) -> Tensor:
        """What the rate multiplies."""
        if self.rule == "rms":
            return relative_E / relative_E.square().mean().sqrt().clamp(min=torch.finfo(relative_E.dtype).tiny)
        return relative_E if self.rule == "linear" else sign_E

    def _observe(self, statistics: dict[str, Tensor], relative_E: Float[Tensor, " E"]) -> None:
        """Note what the window says of the last step and of the bias that routed it."""
        self.overshoots += (relative_E * self.last_step_E).sum() < 0  # the loads pushed back
        if "best" in statistics:
            best, tokens = statistics["best"], statistics["tokens"].clamp(min=1)
            rows = statistics["demand_E"].sum().to(best.dtype)
            self.dual = (best - rows * self.bias_E.mean()) / tokens


_ALARM = (
    "Two selection biases of a layer lie {alarm:g} or more apart (bias.alarm): where scores span no more than that, "
    "the bias alone decides between these two experts, and it may run away; lower bias.rate, begin with a larger "
    "top_k, or take a method with a loss, such as global_batch (bias.alarm=0 turns this off)."
)
