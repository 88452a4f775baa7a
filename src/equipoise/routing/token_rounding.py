"""Token rounding: each expert's rows are rounded to whole tiles, so that no tile is computed in part."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equipoise.contracts import Call, Routing, Scores
from equipoise.errors import require
from equipoise.routing.keyed import new_key, uniform
from equipoise.routing.rows import pack
from equipoise.routing.selector import Selector
from equipoise.routing.top_k import TopK

RULES = ("nearest", "stochastic", "nearest_score", "balance", "up", "down")


class TokenRounding(Selector):
    """Top-K, then each expert's rows up to a multiple of ``tile``: the last are dropped, or the next best tokens added.

    Token choice comes first: an added token never takes the place of one that chose the expert. Evaluation routes by
    top-K alone. N = min(T*K + E*tile, T*E) rows in training. A call with fewer than 2 tiles per expert on average
    rounds to smaller ones, of ``tokens * K / (2 E)`` rows, at least 1 (which is top-K): else it would drop most rows.

    Args:
        num_experts: E.
        tile: rows of a tile.
        rule: from f chosen rows, between the multiples lo and hi. ``"nearest"``: the nearer, lo on a tie.
            ``"stochastic"``: hi with probability (f - lo) / (hi - lo). ``"nearest_score"``: hi with the share that the
            rows from lo to f have in the scores of those from lo to hi. ``"balance"``: expert by expert, so that the
            sum over the experts so far is nearest to what was chosen. ``"up"``: hi. ``"down"``: lo, which only drops.
        renormalize: make the weights of a token's K choices sum to 1 before rounding. None: for K > 1. Added rows weigh
            their score; what dropped rows weighed is not given to others. Rows that are dropped here are not counted as
            ``dropped``, since no expert was full: demand is what is computed.

    Source: SonicMoE (2512.14080), token rounding, and its authors' benchmark. Differs: hi is kept within the number of
    tokens; the smaller tiles of small calls are ours, where the paper asks for 2 tiles per expert. INFERRED: the score
    mass of ``nearest_score``, and ties of ``balance``, which go down.
    """

    looks_ahead = True
    key: Tensor

    def __init__(self, num_experts: int, *, tile: int = 128, rule: str = "nearest", renormalize: bool | None = None):
        super().__init__(num_experts, renormalize=renormalize)
        require(tile >= 1, f"tile={tile} is impossible; give a positive number of rows.")
        require(rule in RULES, f"rule={rule!r} is unknown; choose one of {', '.join(RULES)}.")
        self.tile, self.rule = tile, rule
        self.token_choice = TopK(num_experts, renormalize=renormalize)
        self.register_buffer("key", new_key())

    def forward(self, call: Call, scores: Scores) -> Routing:
        """Choose the rows."""
        if not call.training:
            return self.token_choice(call, scores)
        num_tokens, num_experts = scores.choice_TE.shape
        chosen_TE, weight_TE = self._token_choice(call, scores)
        rank_ET = _ranks(chosen_TE, weight_TE.detach(), scores.choice_TE.detach(), call.mask_T)
        chosen_E = chosen_TE.sum(0) if call.mask_T is None else (chosen_TE & call.mask_T[:, None]).sum(0)
        kept_E = self.round(call, chosen_E, _mass(scores.gate_TE.detach(), rank_ET))
        kept_ET = rank_ET < kept_E[:, None]
        rows = self.num_rows(num_tokens, num_experts, call.k)
        place_ET = (kept_ET.reshape(-1).cumsum(0) - 1).masked_fill(~kept_ET.reshape(-1), rows)
        flat = torch.arange(num_experts * num_tokens, device=place_ET.device)
        unused = torch.full((rows + 1,), num_experts * num_tokens, device=place_ET.device)
        index_N = unused.scatter(0, place_ET, flat)[:rows]
        expert_N, token_N = index_N // max(1, num_tokens), index_N % max(1, num_tokens)
        return pack(scores, token_N, expert_N, self.weigh(call, scores, token_N, expert_N))

    def round(self, call: Call, chosen_E: Int[Tensor, " E"], mass_ET: Float[Tensor, "E more"]) -> Int[Tensor, " E"]:
        """The rows that each expert keeps.

        Args:
            chosen_E: f, rows that chose the expert.
            mass_ET: the sum of the scores of its first 0, 1, ... T rows.
        """
        tokens = call.tokens()
        tile = (tokens * call.k // (2 * len(chosen_E))).clamp(1, self.tile)
        low_E = chosen_E // tile * tile
        rest_E = chosen_E - low_E
        high_E = torch.minimum(low_E + tile, tokens)
        if self.rule == "nearest":
            up_E = 2 * chosen_E > low_E + high_E
        elif self.rule == "balance":
            tiles_E = (2 * rest_E.cumsum(0) + tile - 1) // (2 * tile)
            up_E = tiles_E.diff(prepend=tiles_E.new_zeros(1)) > 0
        elif self.rule in ("up", "down"):
            up_E = (rest_E > 0) & (self.rule == "up")
        else:
            up_E = uniform(self.key, call.step, tuple(chosen_E.shape)) < self._chance(mass_ET, low_E, chosen_E, high_E)
        return torch.where(up_E & (rest_E > 0), high_E, low_E)

    def num_rows(self, num_tokens: int, num_experts: int, k: int) -> int:
        """N = T*K and a tile more per expert, at most T*E."""
        return min(num_tokens * k + num_experts * self.tile, num_tokens * num_experts)

    def weigh(
        self, call: Call, scores: Scores, token_N: Int[Tensor, " N"], expert_N: Int[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """The renormalised gates of a token's K choices, the plain gates of others."""
        _, weight_TE = self._token_choice(call, scores)
        index_N = token_N * weight_TE.shape[1] + expert_N.clamp(max=weight_TE.shape[1] - 1)
        return weight_TE.reshape(-1).gather(0, index_N).masked_fill(expert_N == weight_TE.shape[1], 0)

    def _token_choice(self, call: Call, scores: Scores) -> tuple[Bool[Tensor, "T E"], Float[Tensor, "T E"]]:
        """Which experts a token chooses, and what every expert would weigh for it."""
        expert_TK = scores.choice_TE.topk(call.k, dim=-1).indices
        chosen_TE = torch.zeros_like(scores.choice_TE, dtype=torch.bool).scatter(1, expert_TK, True)
        if not (call.k > 1 if self.renormalize is None else self.renormalize):
            return chosen_TE, scores.gate_TE
        total_T1 = scores.gate_TE.gather(1, expert_TK).sum(1, keepdim=True) + 1e-20
        return chosen_TE, torch.where(chosen_TE, scores.gate_TE / total_T1, scores.gate_TE)

    def _chance(
        self,
        mass_ET: Float[Tensor, "E more"],
        low_E: Int[Tensor, " E"],
        chosen_E: Int[Tensor, " E"],
        high_E: Int[Tensor, " E"],
    ) -> Float[Tensor, " E"]:
        """The probability of rounding up."""
        if self.rule == "stochastic":
            return (chosen_E - low_E).double() / (high_E - low_E).clamp(min=1)
        low, now, high = (mass_ET.gather(1, end_E[:, None])[:, 0] for end_E in (low_E, chosen_E, high_E))
        return (now - low) / (high - low).clamp(min=1e-20)


def _ranks(
    chosen_TE: Bool[Tensor, "T E"],
    weight_TE: Float[Tensor, "T E"],
    choice_TE: Float[Tensor, "T E"],
    mask_T: Bool[Tensor, " T"] | None,
) -> Int[Tensor, "E T"]:
    """Each token's place in each expert's order: who chose it by weight, the others by score, padding last."""
    order_ET = torch.where(chosen_TE, weight_TE, choice_TE).T.argsort(dim=1, descending=True, stable=True)
    late_ET = (~chosen_TE).T if mask_T is None else torch.where(mask_T[:, None], ~chosen_TE, 2).T
    order_ET = order_ET.gather(1, late_ET.gather(1, order_ET).to(torch.int8).argsort(dim=1, stable=True))
    place_T = torch.arange(len(weight_TE), device=order_ET.device)
    return torch.empty_like(order_ET).scatter(1, order_ET, place_T.expand_as(order_ET))


def _mass(gate_TE: Float[Tensor, "T E"], rank_ET: Int[Tensor, "E T"]) -> Float[Tensor, "E more"]:
    """The sum of the gates of each expert's first 0, 1, ... T tokens."""
    sorted_ET = torch.empty_like(gate_TE.T).scatter(1, rank_ET, gate_TE.T)
    return torch.nn.functional.pad(sorted_ET, (1, 0)).cumsum(1)
