from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise import MoE, UserError
from equipoise.routing.token_rounding import RULES, TokenRounding
from equipoise.routing.top_k import TopK
from hand_made import call_of, check_order, dense, scores_of

few = settings(max_examples=120, deadline=None, derandomize=True)


def scores(tokens, experts, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    skew_E = spread * torch.randn(experts, generator=generator)
    return (torch.randn(tokens, experts, generator=generator) + skew_E).double().softmax(1)


def by_loop(score_TE, k, tile, rule, mask_T=None):
    """Expert by expert: the table of weights, for the rules that draw nothing."""
    tokens, experts = score_TE.shape
    real = [t for t in range(tokens) if mask_T is None or mask_T[t]]
    tile = min(tile, max(1, len(real) * k // (2 * experts)))
    chosen = {t: score_TE[t].topk(k).indices.tolist() for t in real}
    weight_TE, error = torch.zeros_like(score_TE), 0
    for e in range(experts):
        inside = [t for t in real if e in chosen[t]]
        share = {t: score_TE[t, e] / score_TE[t][chosen[t]].sum() if k > 1 else score_TE[t, e] for t in inside}
        order = sorted(inside, key=lambda t, share=share: -share[t])
        order += sorted((t for t in real if t not in inside), key=lambda t, e=e: -score_TE[t, e])
        low = len(inside) // tile * tile
        high = min(-(-len(inside) // tile) * tile, len(real))
        up = {
            "nearest": high - len(inside) < len(inside) - low,
            "up": True,
            "down": False,
            "balance": abs(error + low + tile - len(inside)) < abs(error + low - len(inside)) and high > low,
        }[rule]
        error += (low + tile if up else low) - len(inside)
        for t in order[: high if up else low]:
            weight_TE[t, e] = share.get(t, score_TE[t, e])
    return weight_TE


@st.composite
def cases(draw):
    experts, tokens = draw(st.integers(1, 6)), draw(st.integers(0, 37))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    mask_T = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    score_TE = scores(tokens, experts, draw(st.integers(0, 99)))
    return score_TE, draw(st.integers(1, experts)), draw(st.integers(1, 9)), mask_T


@few
@given(cases(), st.sampled_from(["nearest", "balance", "up", "down"]))
def test_it_is_the_papers_algorithm(case, rule):
    score_TE, k, tile, mask_T = case
    selector = TokenRounding(score_TE.shape[1], tile=tile, rule=rule)
    routing = selector(call_of(score_TE, k, mask_T), scores_of(score_TE))
    check_order(routing)
    weight_TE, _ = dense(routing, len(score_TE))
    torch.testing.assert_close(weight_TE, by_loop(score_TE, k, tile, rule, mask_T), rtol=1e-9, atol=1e-12)
    assert len(routing.token_N) == selector.num_rows(*score_TE.shape, k)


@few
@given(cases(), st.sampled_from(RULES))
def test_loads_are_whole_tiles_near_what_was_chosen(case, rule):
    score_TE, k, tile, mask_T = case
    experts = score_TE.shape[1]
    routing = TokenRounding(experts, tile=tile, rule=rule)(call_of(score_TE, k, mask_T), scores_of(score_TE))
    chosen = TopK(experts)(call_of(score_TE, k, mask_T), scores_of(score_TE)).load_E
    tokens = len(score_TE) if mask_T is None else int(mask_T.sum())
    used = min(tile, max(1, tokens * k // (2 * experts)))
    whole = (routing.load_E % used == 0) | (routing.load_E == tokens)
    assert whole.all()
    assert ((routing.load_E - chosen).abs() < used).all()
    assert (routing.load_E[chosen == 0] == 0).all()
    if rule == "nearest":
        assert (2 * (routing.load_E - chosen).abs() <= used).logical_or(routing.load_E == tokens).all()


@few
@given(cases(), st.sampled_from(RULES))
def test_no_added_token_displaces_one_that_chose_the_expert(case, rule):
    score_TE, k, tile, mask_T = case
    experts = score_TE.shape[1]
    selector = TokenRounding(experts, tile=tile, rule=rule)
    _, kept_TE = dense(selector(call_of(score_TE, k, mask_T), scores_of(score_TE)), len(score_TE))
    _, chosen_TE = dense(TopK(experts)(call_of(score_TE, k, mask_T), scores_of(score_TE)), len(score_TE))
    added_E, dropped_E = (kept_TE & ~chosen_TE).any(0), (chosen_TE & ~kept_TE).any(0)
    assert not (added_E & dropped_E).any()
    assert not added_E.any() or rule != "down"
    assert not dropped_E.any() or rule != "up"


def test_a_tile_of_one_is_top_k():
    score_TE = scores(17, 5)
    for k in (1, 2, 5):
        ours = dense(TokenRounding(5, tile=1)(call_of(score_TE, k), scores_of(score_TE)), 17)
        theirs = dense(TopK(5)(call_of(score_TE, k), scores_of(score_TE)), 17)
        for mine, other in zip(ours, theirs):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=0)


def test_evaluation_is_top_k():
    score_TE = scores(40, 5)
    call = call_of(score_TE, 2, training=False)
    ours, theirs = (selector(call, scores_of(score_TE)) for selector in (TokenRounding(5), TopK(5)))
    for name in ("token_N", "expert_N", "weight_N", "load_E"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_a_call_with_few_tokens_rounds_to_smaller_tiles():
    """20 rows for each of 5 experts: tiles of 128 would keep none, tiles of 10 are two each on average."""
    score_TE = scores(50, 5)
    load_E = TokenRounding(5)(call_of(score_TE, 2), scores_of(score_TE)).load_E
    assert load_E.tolist() == TokenRounding(5, tile=10)(call_of(score_TE, 2), scores_of(score_TE)).load_E.tolist()
    assert (load_E % 10 == 0).all()
    assert load_E.sum() > 50


@pytest.mark.parametrize("rule", RULES)
def test_the_sum_of_the_rows(rule):
    """``balance`` keeps it within half a tile of what was chosen, whatever the number of experts."""
    score_TE, gaps = scores(400, 16), []
    for seed in range(10):
        score_TE = scores(400, 16, seed)
        load_E = TokenRounding(16, tile=16, rule=rule)(call_of(score_TE, 2), scores_of(score_TE)).load_E
        gaps.append(int(load_E.sum()) - 800)
    assert {"balance": max(map(abs, gaps)) <= 8, "up": min(gaps) > 50, "down": max(gaps) < -50}.get(rule, True)
    assert max(map(abs, gaps)) > 8 or rule == "balance"


def test_random_rules_round_up_as_often_as_they_should():
    """Over many steps; every draw of a step is the same, and a new step's another."""
    score_TE = scores(60, 4, seed=2)
    call, chosen_E = call_of(score_TE, 2), TopK(4)(call_of(score_TE, 2), scores_of(score_TE)).load_E
    rest_E = chosen_E % 8
    assert rest_E.max() > 0
    shares = {}
    for rule in ("stochastic", "nearest_score"):
        selector, up_E = TokenRounding(4, tile=8, rule=rule), torch.zeros(4)
        assert torch.equal(selector(call, scores_of(score_TE)).load_E, selector(call, scores_of(score_TE)).load_E)
        for step in range(300):
            up_E += selector(replace(call, step=torch.tensor(step)), scores_of(score_TE)).load_E > chosen_E
        shares[rule] = up_E / 300
    torch.testing.assert_close(shares["stochastic"], rest_E / 8, rtol=0, atol=0.08)
    mass_E = torch.zeros(4)
    for e in range(4):
        top = score_TE.topk(2).indices.eq(e).any(1)
        gate = torch.where(top, score_TE[:, e] / score_TE.topk(2).values.sum(1), score_TE[:, e] - 1)
        mass = score_TE[gate.argsort(descending=True), e]
        low = int(chosen_E[e] - rest_E[e])
        mass_E[e] = mass[low : chosen_E[e]].sum() / mass[low : low + 8].sum()
    torch.testing.assert_close(shares["nearest_score"], mass_E, rtol=0, atol=0.08)
    assert (shares["nearest_score"] - shares["stochastic"]).abs().max() > 0.07


@pytest.mark.parametrize("rule", ["nearest", "stochastic"])
def test_the_upper_end_is_the_number_of_tokens_where_a_tile_would_pass_it(rule):
    """95 tokens chose the first of two experts: smaller tiles of 23 end at 92 and at 115, of which 95 can be had."""
    score_TE = torch.tensor([[0.9, 0.1]], dtype=torch.float64).repeat(95, 1)
    selector, call = TokenRounding(2, rule=rule), call_of(score_TE, 1)
    for step in range(20):
        load_E = selector(replace(call, step=torch.tensor(step)), scores_of(score_TE)).load_E
        assert load_E.tolist() == [95, 0]


def test_a_layer_trains_and_counts_what_it_computes():
    layer = MoE(dim=7, hidden_dim=3, num_experts=5, top_k=2, method="token_rounding", tile=4, kernel="loop")
    layer(torch.randn(50, 7))
    assert (layer.routing.load_E % 4 == 0).all()
    assert layer.routing.dropped_E.eq(0).all()


@pytest.mark.parametrize("given", [{"tile": 0}, {"rule": "down_up"}])
def test_impossible_settings_are_refused(given):
    with pytest.raises(UserError, match=next(iter(given))):
        TokenRounding(5, **given)
