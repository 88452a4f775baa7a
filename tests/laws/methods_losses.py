"""What the laws need to know of ERC, Sigma-MoE-Tiny, AdaMoE, token rounding and noisy top-k gating."""

from typing import Any

import torch

SETTINGS: dict[str, dict[str, Any]] = {
    "adamoe": {"nulls": 4},  # so that most tokens take true experts
    # The laws' calls are small; and a loss over the global batch, which adamoe has, would be of no split.
    "token_rounding": {"tile": 3, "balance_loss.scope": "micro"},
    "importance_load": {"noisy.noise": False},  # drawn by a token's place in the call, which most laws move
}
ROUNDED = "it rounds the rows of one call, by definition"
ONE_CALL = "its loss is of one micro-batch on one rank, by definition"
PER_CALL = {"token_rounding": ROUNDED, **dict.fromkeys(("erc", "sigma_tiny", "importance_load"), ONE_CALL)}
SPLITS = (
    "test_counting.test_accumulation_counts_and_learns_as_one_batch",
    "test_foreign_loops.test_every_loop_counts_what_is_frozen",
    "test_foreign_loops.test_every_loop_gives_the_same",
    "test_foreign_loops.test_uneven_token_sums_equal_one_batch",
)
EXEMPTIONS: dict[tuple[str, str], str] = {
    ("adamoe", "test_ranks.test_a_rank_without_a_micro_batch"): "every backward pass counts over all ranks",
    ("adamoe", "test_state.test_no_choice_no_update"): "with null experts, K = E is a choice",
    ("erc", "test_state.test_all_tokens_to_one_expert"): "its loss reaches the weights of every expert",
    **{("token_rounding", law): ROUNDED for law in SPLITS},
    ("token_rounding", "test_losses.test_a_dropped_row_is_demand"): "what it rounds away was not chosen",
    ("token_rounding", "test_symmetry.test_weights_ignore_the_selection_state"): "added rows weigh their plain score",
}


def erc(layer, logit_TE):
    """A loop over pairs of experts; the noise is the layer's own."""
    balancer, router_ED = layer.balancers["erc"], layer.router.weight
    row_ED = router_ED * balancer.blur(router_ED.detach(), layer.step) if balancer.noise else router_ED
    gate_EFD = layer.experts.gate_up[:, : layer.experts.gate_up.shape[1] // 2]
    answer = [[(gate @ row).square().sum().sqrt() for gate in gate_EFD] for row in row_ED]
    total, count = 0, len(row_ED)
    for i in range(count):
        for j in range(count):
            if i != j:
                total = total + (answer[i][j] - answer[i][i]).relu() + (answer[j][i] - answer[i][i]).relu()
    return total / count**2


def top1_loss(layer, logit_TE):
    prob_TE = logit_TE.exp() / logit_TE.exp().sum(1, keepdim=True)
    confidence = prob_TE.sort(1).values[:, -layer.top_k :].sum(1).mean()
    return prob_TE.shape[1] * (prob_TE.mean(0) ** 2).sum() / confidence


def null_loss(layer, logit_TE):
    share_E = layer.routing.demand_E() / layer.routing.demand_E().sum().double()
    nulls = share_E[layer.num_experts :]
    share_E = torch.cat([share_E[: layer.num_experts], nulls.mean().expand_as(nulls)])
    return len(share_E) * (share_E * logit_TE.softmax(1).mean(0)).sum()


def importance_load(layer, logit_TE):
    """Without noise: a loop over tokens and experts."""
    normal, scale = torch.distributions.Normal(0.0, 1.0), torch.log(torch.tensor(2.0, dtype=logit_TE.dtype))
    gates, chances = [], []
    for logit_E in logit_TE:
        best = logit_E.topk(layer.top_k).indices
        gates.append(torch.zeros_like(logit_E).scatter(0, best, logit_E[best].softmax(0)))
        others = [torch.cat([logit_E[:e], logit_E[e + 1 :]]) for e in range(len(logit_E))]
        exceeds_E = torch.stack([other.sort(descending=True).values[layer.top_k - 1] for other in others])
        chances.append(normal.cdf((logit_E - exceeds_E) / scale))
    sums = torch.stack(gates).sum(0), torch.stack(chances).sum(0)
    return sum(value_E.var(unbiased=False) / value_E.mean() ** 2 for value_E in sums)


FORMULAS = {"erc": erc, "top1_loss": top1_loss, "null_loss": null_loss, "importance_load": importance_load}
