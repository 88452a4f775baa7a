from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise import MoE, UserError
from equipoise.routing.expert_choice import ExpertChoice
from equipoise.routing.top_k import TopK
from hand_made import call_of, check_order, dense, scores_of

few = settings(max_examples=80, deadline=None, derandomize=True)


@st.composite
def cases(draw):
    """Scores with distinct entries, K, and a mask."""
    num_tokens, num_experts = draw(st.integers(0, 19)), draw(st.integers(1, 7))
    k = draw(st.integers(1, num_experts))
    score_TE = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    return score_TE, k, None if mask is None else torch.tensor(mask, dtype=torch.bool)


def taken_by_loop(score_TE, k, mask_T):
    """The (token, expert) pairs when each expert takes its floor(tokens * K / E) best tokens, at least one."""
    num_experts = score_TE.shape[1]
    real = range(len(score_TE)) if mask_T is None else [t for t, is_real in enumerate(mask_T.tolist()) if is_real]
    capacity = max(1, len(real) * k // num_experts)
    return {
        (t, e) for e in range(num_experts) for t in sorted(real, key=lambda t, e=e: -score_TE[t, e].item())[:capacity]
    }


def pairs(routing):
    return {(t, e) for t, e in zip(routing.token_N.tolist(), routing.expert_N.tolist()) if e < len(routing.load_E)}


@few
@given(cases(), st.booleans())
def test_every_expert_takes_exactly_its_share_of_the_best_real_tokens(case, renormalize):
    score_TE, k, mask_T = case
    num_tokens, num_experts = score_TE.shape
    routing = ExpertChoice(num_experts, renormalize=renormalize)(call_of(score_TE, k, mask_T), scores_of(score_TE))
    check_order(routing)
    tokens = num_tokens if mask_T is None else int(mask_T.sum())
    assert routing.load_E.tolist() == [min(tokens, max(1, tokens * k // num_experts))] * num_experts
    assert pairs(routing) == taken_by_loop(score_TE, k, mask_T)
    assert routing.dropped_E.eq(0).all()


def test_the_number_of_rows_does_not_depend_on_the_mask():
    score_TE = torch.rand(17, 5)
    mask_T = torch.arange(17) < 4
    masked = ExpertChoice(5)(call_of(score_TE, 2, mask_T), scores_of(score_TE))
    whole = ExpertChoice(5)(call_of(score_TE, 2), scores_of(score_TE))
    assert len(masked.token_N) == len(whole.token_N) == 5 * (17 * 2 // 5)
    assert masked.load_E.tolist() == [1] * 5


def test_weights_are_the_scores_themselves_by_default():
    score_TE = torch.rand(17, 5)
    routing = ExpertChoice(5)(call_of(score_TE, 2), scores_of(score_TE))
    assert torch.equal(routing.weight_N, score_TE[routing.token_N, routing.expert_N])


def test_renormalised_weights_sum_to_one_over_the_experts_that_took_the_token():
    score_TE = torch.rand(17, 5)
    weight_TE, taken_TE = dense(ExpertChoice(5, renormalize=True)(call_of(score_TE, 2), scores_of(score_TE)), 17)
    share_TE = score_TE * taken_TE / (score_TE * taken_TE).sum(1, keepdim=True)
    torch.testing.assert_close(weight_TE, share_TE.nan_to_num(0), rtol=1e-6, atol=0)
    assert not taken_TE.any(1).all(), "the case should have a token that nobody took"


def test_padding_with_the_best_scores_is_not_taken():
    score_TE = torch.rand(17, 5)
    score_TE[::2] += 100
    mask_T = torch.arange(17) % 2 == 1
    routing = ExpertChoice(5)(call_of(score_TE, 2, mask_T), scores_of(score_TE))
    used = routing.expert_N < 5
    assert (routing.token_N[used] % 2 == 1).all()
    assert routing.load_E.tolist() == [3] * 5


def test_evaluation_is_refused_unless_a_fall_back_is_named():
    score_TE = torch.rand(17, 5)
    with pytest.raises(UserError, match=r"evaluation='top_k'.*'as_trained'"):
        ExpertChoice(5)(call_of(score_TE, 2, training=False), scores_of(score_TE))


@pytest.mark.parametrize("renormalize", [False, True])
def test_falling_back_to_top_k_routes_every_token_by_itself(renormalize):
    score_TE = torch.rand(17, 5)
    selector = ExpertChoice(5, renormalize=renormalize, evaluation="top_k")
    fallen = selector(call_of(score_TE, 2, training=False), scores_of(score_TE))
    expected = TopK(5, renormalize=renormalize)(call_of(score_TE, 2, training=False), scores_of(score_TE))
    assert fallen.load_E.tolist() == expected.load_E.tolist()
    for ours, theirs in zip(dense(fallen, 17), dense(expected, 17)):
        assert torch.equal(ours, theirs)


def test_as_trained_evaluates_as_it_trains():
    score_TE = torch.rand(17, 5)
    selector = ExpertChoice(5, evaluation="as_trained")
    trained, evaluated = (
        selector(call_of(score_TE, 2, training=training), scores_of(score_TE)) for training in (True, False)
    )
    assert torch.equal(trained.token_N, evaluated.token_N)
    assert torch.equal(trained.weight_N, evaluated.weight_N)


def test_an_unknown_fall_back_is_refused():
    with pytest.raises(UserError, match="refuse, top_k, as_trained"):
        ExpertChoice(5, evaluation="train")


def by_sequence(score_TE, k, mask_T, length):
    """The pairs when every expert takes its share of each sequence's tokens."""
    found = set()
    for start in range(0, len(score_TE), length):
        mask = None if mask_T is None else mask_T[start : start + length]
        found |= {(start + t, e) for t, e in taken_by_loop(score_TE[start : start + length], k, mask)}
    return found


@pytest.mark.parametrize("masked", [False, True])
def test_no_sequences_have_no_rows(masked):
    layer = MoE(dim=7, hidden_dim=3, num_experts=5, top_k=2, method="expert_choice", per="sequence", kernel="loop")
    for shape in ((0, 4), (3, 0)):
        mask = torch.ones(*shape, dtype=torch.bool) if masked else None
        assert layer(torch.zeros(*shape, 7), mask).shape == (*shape, 7)
        assert layer.routing.load_E.tolist() == [0] * 5


@few
@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_sequences_compete_by_themselves(sequences, length, k, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    score_TE = torch.rand(sequences * length, 5, generator=generator)
    mask_T = torch.rand(sequences * length, generator=generator) < 0.6 if masked else None
    call = replace(call_of(score_TE, k, mask_T), num_sequences=sequences)
    selector = ExpertChoice(5, per="sequence", renormalize=True)
    routing = selector(call, scores_of(score_TE))
    check_order(routing)
    assert pairs(routing) == by_sequence(score_TE, k, mask_T, length)
    assert len(routing.token_N) == selector.rows_of(call, 5)
    weight_TE, taken_TE = dense(routing, len(score_TE))
    torch.testing.assert_close(weight_TE.sum(1), taken_TE.any(1).float())
