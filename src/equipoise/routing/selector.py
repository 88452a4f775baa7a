"""What every selector is: which experts a token gets, and with which weights."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from equipoise.contracts import Call, Scores
from equipoise.errors import require
from equipoise.routing.rows import weigh


class Selector(nn.Module):
    """Scores to routing, ``forward(call, scores) -> Routing``: K rows per token with weights from the gate by default.

    Args:
        num_experts: E.
        renormalize: make a token's weights sum to 1. None: for K > 1, since at K = 1 the weight would be the constant 1
            and the router would get no gradient.

    Attributes:
        causal: False where evaluation, too, gives a token experts that depend on other tokens.
        looks_ahead: True where training gives a token experts that depend on other tokens of the call.
        nulls: null experts beside the E true ones.
        identity: null experts answer with the token itself, else with nothing.
    """

    causal: bool = True
    looks_ahead: bool = False
    nulls: int = 0
    identity: bool = False

    def __init__(self, num_experts: int, *, renormalize: bool | None = None):
        super().__init__()
        self.num_experts, self.renormalize = num_experts, renormalize

    def num_rows(self, num_tokens: int, num_experts: int, k: int) -> int:
        """N, the static bound on the rows of a call: T*K."""
        return num_tokens * k

    def rows_of(self, call: Call, num_experts: int) -> int:
        """N of this very call."""
        return self.num_rows(call.x_TD.shape[0], num_experts, call.k)

    def planned_rows(self, num_experts: int, k: int) -> float:
        """Rows per token that true experts are expected to compute, by which budgets are planned: K."""
        return float(k)

    def refuse(self, k: int) -> None:
        """Fails: UserError where these settings make no sense with K experts per token."""
        sentence = "renormalize=True with top_k=1 makes every weight 1 and starves the router; leave it out."
        require(not (self.renormalize and k == 1), sentence)

    def weigh(
        self, call: Call, scores: Scores, token_N: Int[Tensor, " N"], expert_N: Int[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """The combine weights of rows chosen by anyone, read from the live gate."""
        return weigh(scores, token_N, expert_N, call.k > 1 if self.renormalize is None else self.renormalize)
