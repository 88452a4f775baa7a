import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise import METHODS, MoE
from equipoise.contracts import Scores
from equipoise.errors import UserError
from equipoise.routing.softmax import Softmax
from equipoise.routing.top_k import TopK
from hand_made import awkward_logits, call_of, check_order, dense, scores_of

few = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def cases(draw):
    """A gate table with distinct entries, K and a mask."""
    num_tokens, num_experts = draw(st.integers(0, 13)), draw(st.integers(2, 7))
    k = draw(st.integers(1, num_experts))
    gate_TE = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    return gate_TE + 0.01, k, None if mask is None else torch.tensor(mask, dtype=torch.bool)


def chosen_by_loop(gate_TE, k, mask_T):
    """Every token's K best experts, in plain Python."""
    real = range(len(gate_TE)) if mask_T is None else [t for t, is_real in enumerate(mask_T.tolist()) if is_real]
    return {t: sorted(range(gate_TE.shape[1]), key=lambda e, t=t: -gate_TE[t, e].item())[:k] for t in real}


def kept_by_loop(chosen, gate_TE, capacity, drop):
    """The (token, expert) pairs that fit: each expert serves its best, or its first, tokens until it is full."""
    kept = set()
    for e in range(gate_TE.shape[1]):
        waiting = [t for t, experts in chosen.items() if e in experts]
        waiting.sort(key=lambda t, e=e: -gate_TE[t, e].item() if drop == "score" else t)
        kept |= {(t, e) for t in waiting[:capacity]}
    return kept


def chosen_in_groups_by_loop(choice_TE, k, groups, kept_groups):
    """Every token's K best experts of the groups in which its K / kept_groups best add up to most."""
    size, chosen = choice_TE.shape[1] // groups, {}
    for token, row in enumerate(choice_TE.tolist()):
        members = [range(group * size, group * size + size) for group in range(groups)]
        sums = [sum(sorted((row[e] for e in group), reverse=True)[: k // kept_groups]) for group in members]
        kept = sorted(range(groups), key=lambda g, sums=sums: -sums[g])[:kept_groups]
        chosen[token] = sorted((e for g in kept for e in members[g]), key=lambda e, row=row: -row[e])[:k]
    return chosen


def pairs(routing):
    return {(t, e) for t, e in zip(routing.token_N.tolist(), routing.expert_N.tolist()) if e < len(routing.load_E)}


@few
@given(cases())
def test_every_real_token_takes_its_best(case):
    gate_TE, k, mask_T = case
    routing = TopK(gate_TE.shape[1])(call_of(gate_TE, k, mask_T), scores_of(gate_TE))
    chosen = chosen_by_loop(gate_TE, k, mask_T)
    check_order(routing)
    assert pairs(routing) == {(t, e) for t, experts in chosen.items() for e in experts}
    assert len(routing.token_N) == len(gate_TE) * k
    assert routing.dropped_E.eq(0).all()


@few
@given(cases(), st.sampled_from([0.25, 0.5, 1.0, 1.25, 2.0]), st.sampled_from(["score", "position"]))
def test_within_a_capacity_the_best_or_the_first_rows_are_kept(case, factor, drop):
    gate_TE, k, mask_T = case
    num_experts = gate_TE.shape[1]
    selector = TopK(num_experts, capacity_factor=factor, drop=drop, renormalize=False)
    routing = selector(call_of(gate_TE, k, mask_T), scores_of(gate_TE))
    chosen = chosen_by_loop(gate_TE, k, mask_T)
    capacity = math.ceil(Fraction(factor) * len(chosen) * k / num_experts)
    kept = kept_by_loop(chosen, gate_TE, capacity, drop)
    check_order(routing)
    assert pairs(routing) == kept
    weight_TE, _ = dense(routing, len(gate_TE))
    assert all(weight_TE[t, e] == gate_TE[t, e] for t, e in kept)
    demand = [sum(e in experts for experts in chosen.values()) for e in range(num_experts)]
    assert routing.demand_E().tolist() == demand
    assert routing.dropped_E.tolist() == [max(0, rows - capacity) for rows in demand]


@pytest.mark.parametrize(("factor", "tokens"), [(0.3, 25), (1.2, 100), (1.1, 50), (1.4, 25), (1.2, 4000)])
def test_capacity_is_exact_for_decimal_factors(factor, tokens):
    # Each product of factor, tokens, K and 1/E is a whole number, on which a rounding error costs a whole row.
    gate_TE = torch.rand(tokens, 5) + torch.tensor([9.0, 9.0, 0, 0, 0])
    routing = TopK(5, capacity_factor=factor)(call_of(gate_TE, 2), scores_of(gate_TE))
    assert routing.load_E.tolist() == [Fraction(str(factor)) * tokens * 2 / 5] * 2 + [0, 0, 0]


def test_by_score_means_by_gate_also_where_weights_are_renormalised():
    # Token 0 has the higher gate for expert 0, token 1 the higher weight after renormalisation.
    gate_TE = torch.tensor([[0.50, 0.40, 0.10], [0.35, 0.05, 0.01], [0.01, 0.02, 0.03]])
    routing = TopK(3, capacity_factor=0.5)(call_of(gate_TE, 2), scores_of(gate_TE))
    assert (0, 0) in pairs(routing)
    assert (1, 0) not in pairs(routing)


def test_ties_are_kept_in_the_order_of_tokens():
    gate_TE = torch.tensor([[0.5, 0.1]] * 7)
    routing = TopK(2, capacity_factor=0.5)(call_of(gate_TE, 1), scores_of(gate_TE))
    assert routing.token_N.tolist()[:2] == [0, 1]
    assert routing.load_E.tolist() == [2, 0]
    assert routing.dropped_E.tolist() == [5, 0]


def test_evaluation_drops_nothing():
    gate_TE = torch.tensor([[0.5, 0.1]] * 7)
    routing = TopK(2, capacity_factor=0.5)(call_of(gate_TE, 1, training=False), scores_of(gate_TE))
    assert routing.load_E.tolist() == [7, 0]
    assert routing.dropped_E.tolist() == [0, 0]


def test_a_dropped_rows_weight_is_given_to_nobody():
    gate_TE = torch.tensor([[0.6, 0.2, 0.1], [0.4, 0.4, 0.1], [0.3, 0.1, 0.3]])
    call, scores = call_of(gate_TE, 2), scores_of(gate_TE)
    free, _ = dense(TopK(3)(call, scores), 3)
    capped_routing = TopK(3, capacity_factor=0.5)(call, scores)
    capped, kept = dense(capped_routing, 3)
    assert capped_routing.dropped_E.sum() == 3
    assert torch.equal(capped, free * kept)


@pytest.mark.parametrize("name", awkward_logits(7))
@pytest.mark.parametrize("k", [1, 2, 7])
def test_a_token_never_takes_an_expert_twice(name, k):
    call = call_of(awkward_logits(7)[name], k)
    routing = TopK(7)(call, Softmax(7)(call))
    check_order(routing)
    assert torch.bincount(routing.token_N).tolist() == [k] * len(call.x_TD)


@pytest.mark.parametrize(("k", "renormalize"), [(1, None), (1, False), (3, False)])
def test_weights_are_the_gate_itself_without_renormalisation(k, renormalize):
    gate_TE = torch.rand(11, 5)
    routing = TopK(5, renormalize=renormalize)(call_of(gate_TE, k), scores_of(gate_TE))
    assert torch.equal(routing.weight_N, gate_TE[routing.token_N, routing.expert_N])


@pytest.mark.parametrize("renormalize", [None, True])
def test_renormalised_weights_are_shares_of_the_chosen_gates(renormalize):
    gate_TE = torch.rand(11, 5)
    weight_TE, chosen_TE = dense(
        TopK(5, renormalize=renormalize)(call_of(gate_TE, 3), scores_of(gate_TE)), len(gate_TE)
    )
    share_TE = gate_TE * chosen_TE / (gate_TE * chosen_TE).sum(1, keepdim=True)
    torch.testing.assert_close(weight_TE, share_TE, rtol=1e-6, atol=0)


@few
@given(st.integers(0, 13), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99), st.data())
def test_a_token_keeps_to_its_best_groups(num_tokens, groups, size, seed, data):
    kept_groups, num_experts = data.draw(st.integers(1, groups)), groups * size
    k = kept_groups * data.draw(st.integers(1, size))
    choice_TE = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    selector = TopK(num_experts, groups=groups, kept_groups=kept_groups)
    selector.refuse(k)
    routing = selector(call_of(choice_TE, k), scores_of(choice_TE))
    chosen = chosen_in_groups_by_loop(choice_TE, k, groups, kept_groups)
    check_order(routing)
    assert pairs(routing) == {(t, e) for t, experts in chosen.items() for e in experts}
    assert all(len({e // size for e in experts}) <= kept_groups for experts in chosen.values())


def test_groups_of_negative_scores_are_not_beaten_by_those_left_out():
    # The first group wins by its sum, -3 against -4; a 0 in place of -inf for the others would then win every row.
    choice_TE = torch.tensor([[-1.0, -2.0, -0.5, -3.5]])
    routing = TopK(4, groups=2, renormalize=False)(call_of(choice_TE, 2), scores_of(choice_TE))
    assert pairs(routing) == {(0, 0), (0, 1)}


@pytest.mark.parametrize("name", awkward_logits(12))
@pytest.mark.parametrize(("groups", "kept_groups"), [(1, 1), (2, 2), (4, 4)])
def test_where_all_groups_are_kept_there_is_no_limit(name, groups, kept_groups):
    call = call_of(awkward_logits(12)[name], 4)
    plain, grouped = (TopK(12, **kwargs) for kwargs in ({}, {"groups": groups, "kept_groups": kept_groups}))
    scores = Softmax(12)(call)
    assert torch.equal(grouped(call, scores).expert_N, plain(call, scores).expert_N)


def test_weights_are_scaled_and_loads_are_not():
    gate_TE = torch.rand(11, 5)
    call, scores = call_of(gate_TE, 3), scores_of(gate_TE)
    plain, scaled = TopK(5, capacity_factor=0.8)(call, scores), TopK(5, capacity_factor=0.8, scale=2.5)(call, scores)
    torch.testing.assert_close(scaled.weight_N, 2.5 * plain.weight_N, rtol=1e-6, atol=0)
    assert torch.equal(scaled.load_E, plain.load_E)
    assert torch.equal(scaled.dropped_E, plain.dropped_E)


@pytest.mark.parametrize(
    ("groups", "kept_groups", "k", "words"),
    [
        (4, 2, 3, "must divide top_k"),
        (4, 2, 8, "groups of 3 experts must hold top_k"),
        (4, 4, 2, "kept_groups=4 does not fit top_k=2"),
    ],
)
def test_groups_that_do_not_fit_k_are_refused(groups, kept_groups, k, words):
    with pytest.raises(UserError, match=words):
        TopK(12, groups=groups, kept_groups=kept_groups).refuse(k)


def test_groups_are_refused_before_training_for_every_k_of_a_schedule():
    with pytest.raises(UserError, match="kept_groups=2 does not fit top_k=3"):
        MoE(dim=3, hidden_dim=5, num_experts=12, top_k={0: 4, 10: 3}, groups=4, kept_groups=2)


def test_one_expert_per_token_cannot_be_renormalised():
    with pytest.raises(UserError, match="renormalize=True with top_k=1"):
        TopK(5, renormalize=True).refuse(1)


def test_choice_ranks_and_the_gate_weighs():
    gate_TE, choice_TE = torch.rand(11, 5), torch.rand(11, 5)
    scores = Scores(gate_TE, gate_TE, gate_TE, choice_TE)
    routing = TopK(5, renormalize=False)(call_of(gate_TE, 2), scores)
    assert pairs(routing) == {(t, e) for t in range(11) for e in choice_TE[t].argsort(descending=True)[:2].tolist()}
    assert torch.equal(routing.weight_N, gate_TE[routing.token_N, routing.expert_N])


def test_the_gradient_reaches_kept_rows_of_real_tokens_only():
    gate_TE = torch.tensor([[0.6, 0.3], [0.5, 0.3], [0.4, 0.3], [0.9, 0.1]], requires_grad=True)
    mask_T = torch.tensor([True, True, True, False])
    selector = TopK(2, capacity_factor=1.0)
    selector(call_of(gate_TE.detach(), 1, mask_T), scores_of(gate_TE)).weight_N.sum().backward()
    assert gate_TE.grad.tolist() == [[1, 0], [1, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"drop": "gate"}, "'score' or 'position'"),
        ({"capacity_factor": 0.0}, "is no factor"),
        ({"capacity_factor": -1.0}, "is no factor"),
        ({"groups": 2}, "must divide the 5 experts"),
        ({"groups": 0}, "must divide the 5 experts"),
        ({"groups": 5, "kept_groups": 6}, "between 1 and groups=5"),
        ({"groups": 5, "kept_groups": 0}, "between 1 and groups=5"),
        ({"kept_groups": 2}, "raise groups"),
        ({"scale": 0.0}, "is no factor"),
        ({"scale": math.inf}, "is no factor"),
    ],
)
def test_impossible_settings_are_refused(setting, words):
    with pytest.raises(UserError, match=words):
        TopK(5, **setting)


@pytest.mark.parametrize(("capacity_factor", "ahead"), [(None, False), (1.0, True)])
def test_a_capacity_looks_ahead(capacity_factor, ahead):
    """Whether a full expert keeps a token depends on later ones; the plain row of the table stays causal."""
    layer = MoE(dim=7, hidden_dim=5, num_experts=5, top_k=2, method="unbalanced", capacity_factor=capacity_factor)
    assert layer.looks_ahead is ahead
    assert METHODS["unbalanced"].looks_ahead is False
