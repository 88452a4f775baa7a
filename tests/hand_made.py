"""Calls, scores and routings that a test writes down itself, and dense views of what came out."""

import torch
from torch import nn

from equipoise.balancing.attach import attach
from equipoise.contracts import Call, Routing, Scores
from equipoise.routing.router import Router


def call_of(logit_TE, k, mask_T=None, training=True, requires_grad=False):
    """A call whose router answers exactly these logits: the tokens are the logits, the router is the identity."""
    num_tokens, num_experts = logit_TE.shape
    router = Router(num_experts, num_experts)
    router.weight = nn.Parameter(torch.eye(num_experts, dtype=logit_TE.dtype), requires_grad=requires_grad)
    step = torch.zeros((), dtype=torch.int64)
    sequence_T = torch.zeros(num_tokens, dtype=torch.int64)
    return Call(logit_TE, mask_T, sequence_T, k, step, num_experts, router, nn.Identity(), training)


def scores_of(score_TE):
    """Scores whose every field is the same table."""
    return Scores(score_TE, score_TE, score_TE, score_TE)


def routing_of(demand_E):
    """A routing of which only the demand is known."""
    none, demand_E = torch.zeros(0, dtype=torch.int64), torch.as_tensor(demand_E, dtype=torch.int64)
    return Routing(none, none, torch.zeros(0), demand_E, torch.zeros_like(demand_E))


def dense(routing, num_tokens):
    """The combine weights as a table [T, E], and which entries a row fills."""
    used = routing.expert_N < len(routing.load_E)
    index = routing.token_N[used], routing.expert_N[used]
    weight_TE = torch.zeros(num_tokens, len(routing.load_E), dtype=routing.weight_N.dtype)
    chosen_TE = torch.zeros(num_tokens, len(routing.load_E), dtype=torch.bool)
    return weight_TE.index_put(index, routing.weight_N[used]), chosen_TE.index_put(index, torch.tensor(True))


def dense_of(weight_TK, expert_TK, num_experts):
    """The same of weights and experts by token, as other libraries return them."""
    weight_TE = torch.zeros(len(weight_TK), num_experts, dtype=weight_TK.dtype).scatter(1, expert_TK, weight_TK)
    chosen_TE = torch.zeros(len(weight_TK), num_experts, dtype=torch.bool).scatter(1, expert_TK, True)
    return weight_TE, chosen_TE


def check_order(routing):
    """Assert what every Routing promises: sorted by expert, then token; unused rows last, weighing 0; true counts."""
    num_experts = len(routing.load_E)
    rows = list(zip(routing.expert_N.tolist(), routing.token_N.tolist()))
    used = [row for row in rows if row[0] < num_experts]
    assert rows[: len(used)] == sorted(set(used)), "rows out of order, doubled, or unused ones not last"
    assert all(expert == num_experts for expert, _ in rows[len(used) :])
    assert routing.weight_N[len(used) :].eq(0).all()
    assert routing.load_E.tolist() == [sum(expert == e for expert, _ in used) for e in range(num_experts)]


def awkward_logits(num_experts, seed=0):
    """Logits [T, E] by name on which routers go wrong: ties, overflow, underflow, near ties."""
    generator = torch.Generator().manual_seed(seed)
    normal_TE = torch.randn(23, num_experts, generator=generator)
    return {
        "normal": normal_TE,
        "all_equal": torch.zeros(3, num_experts),
        "ties": normal_TE.round(),
        "two_levels": (normal_TE > 0).float(),
        "large": normal_TE.sign() * 80,
        "wide": normal_TE * 40,
        "very_negative": normal_TE * 10 - 80,
        "offset": normal_TE + 1000,
        "near_ties": 1 + normal_TE * 1e-6,
    }


def attach_still(model, loss_scale=1.0):
    """Attach the model to an optimizer that moves no weight; its step commits what was counted."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = attach(model, optimizer)
    handle.loss_scale = loss_scale
    return handle, optimizer
