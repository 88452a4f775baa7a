import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from equipoise import MoE
from equipoise.balancing.bip import BIP
from equipoise.errors import UserError
from equipoise.routing.top_k import TopK
from hand_made import attach_still, call_of, scores_of

FINE = 20_000


def statistics_of(balancer, score_TE, k, mask_T=None):
    call = call_of(score_TE, k, mask_T)
    scores = balancer.adjust(call, scores_of(score_TE))
    return balancer.statistics(call, scores, TopK(score_TE.shape[1])(call, scores))


def learn(balancer, score_TE, k, mask_T=None):
    balancer.update(statistics_of(balancer, score_TE, k, mask_T))
    return -balancer.bias_E


def max_vio(score_TE, q_E, k):
    load_E = torch.bincount((score_TE - q_E).topk(k).indices.flatten(), minlength=len(q_E))
    return (load_E.max() / load_E.double().mean() - 1).item()


def turn(score, q, k):
    """One turn of the paper's loop, by sorting: the tokens' prices and the experts'."""
    num_tokens, num_experts = len(score), len(q)
    p = [max(0.0, sorted((s - b for s, b in zip(row, q)), reverse=True)[k]) for row in score]
    place = num_tokens * k // num_experts
    columns = [sorted((row[e] - price for row, price in zip(score, p)), reverse=True) for e in range(num_experts)]
    return p, [max(0.0, column[place]) for column in columns]


def exact(score_TE, q_E, k, turns):
    score, q = score_TE.tolist(), q_E.tolist()
    for _ in range(turns):
        _, q = turn(score, q, k)
    return torch.tensor(q)


def dual(score_TE, q_E, k):
    """The dual's value with the best prices of tokens for these of experts."""
    score, q = score_TE.double().numpy(), q_E.double().numpy()
    p = np.array(turn(score.tolist(), q.tolist(), k)[0])
    bound = np.maximum(score - p[:, None] - q, 0).sum()
    return k * p.sum() + score.shape[0] * k / score.shape[1] * q.sum() + bound


def best_total(score_TE, k):
    """The relaxed program's optimum, by linear programming."""
    num_tokens, num_experts = score_TE.shape
    rows = np.kron(np.eye(num_tokens), np.ones((1, num_experts)))
    columns = np.kron(np.ones((1, num_tokens)), np.eye(num_experts))
    limits = [k] * num_tokens + [num_tokens * k / num_experts] * num_experts
    score = score_TE.double().numpy().ravel()
    return -linprog(-score, A_ub=np.vstack([rows, columns]), b_ub=limits, bounds=(0, 1)).fun


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 31), st.integers(2, 7), st.integers(1, 4), st.integers(0, 99), st.data())
def test_turns_are_the_papers_within_a_bins_width(num_tokens, num_experts, turns, seed, data):
    k, generator = data.draw(st.integers(1, num_experts - 1)), torch.Generator().manual_seed(seed)
    score_TE = torch.randn(num_tokens, num_experts, generator=generator).softmax(1)
    start_E = torch.rand(num_experts, generator=generator) * 0.2
    balancer = BIP(num_experts, iterations=turns, bins=FINE)
    balancer.bias_E.copy_(-start_E)
    expected_E = exact(score_TE, start_E, k, turns)
    torch.testing.assert_close(learn(balancer, score_TE, k), expected_E, rtol=0, atol=2 * turns * 2 / FINE)


@pytest.mark.parametrize("bins", [50, 1000])
def test_the_error_of_a_turn_is_one_bin_of_the_root(bins):
    score_TE = (torch.randn(997, 11) + torch.randn(11)).softmax(1)
    q_E = learn(BIP(11, iterations=1, bins=bins), score_TE, 3)
    expected_E = exact(score_TE, torch.zeros(11), 3, 1)
    assert (expected_E > 0).sum() >= 3
    assert ((q_E.sqrt() - expected_E.sqrt()).abs() <= 1 / bins + 1e-6).all()
    assert q_E[expected_E == 0].eq(0).all()


@pytest.mark.parametrize("k", [1, 3])
def test_every_turn_lowers_the_dual_which_bounds_the_program(k):
    score_TE = (torch.randn(61, 7) + torch.randn(7)).softmax(1)
    balancer, best = BIP(7, iterations=1, bins=FINE), best_total(score_TE, k)
    values = [dual(score_TE, torch.zeros(7), k)]
    for _ in range(12):
        values.append(dual(score_TE, learn(balancer, score_TE, k), k))
    assert all(after <= before + 1e-2 for before, after in pairwise(values))
    assert min(values) >= best - 1e-2
    assert values[0] > best * 1.05
    assert values[-1] < best * 1.01


@pytest.mark.parametrize(("experts", "k", "score", "least"), [(16, 4, torch.softmax, 0.05), (64, 8, "sigmoid", 0.35)])
def test_sixteen_turns_on_the_own_batch_balance_it(experts, k, score, least):
    logit_TE = torch.randn(8192, experts, generator=torch.Generator().manual_seed(0))
    logit_TE = logit_TE + torch.randn(experts, generator=torch.Generator().manual_seed(1))
    score_TE = logit_TE.sigmoid() if score == "sigmoid" else score(logit_TE, 1)
    start = max_vio(score_TE, torch.zeros(experts), k)
    q_E = learn(BIP(experts, iterations=16), score_TE, k)
    assert start > 1.5
    assert max_vio(score_TE, q_E, k) < least


def test_prices_are_never_negative_and_idle_experts_have_none():
    score_TE = (torch.randn(499, 5) + torch.tensor([3.0, 0, 0, 0, -3])).softmax(1)
    q_E = learn(BIP(5), score_TE, 1)
    assert q_E.min() == 0
    assert q_E.argmax() == 0
    assert q_E[4] == 0


def test_micro_batches_of_one_turn_add_up_to_the_batch_exactly():
    score_TE, whole, split = torch.rand(101, 11), BIP(11, iterations=1), BIP(11, iterations=1)
    for _ in range(3):
        learn(whole, score_TE, 3)
        pieces = [statistics_of(split, piece, 3) for piece in score_TE.split([1, 60, 40])]
        split.update({name: sum(piece[name] for piece in pieces) for name in pieces[0]})
        assert torch.equal(whole.bias_E, split.bias_E)
    assert whole.bias_E.any()


def test_the_last_turns_margins_of_all_micro_batches_give_the_price():
    pieces, k = torch.rand(101, 11).split([61, 40]), 3
    balancer = BIP(11, iterations=3, bins=FINE)
    found = [statistics_of(balancer, piece, k) for piece in pieces]
    balancer.update({name: found[0][name] + found[1][name] for name in found[0]})
    margins = []
    for piece in pieces:
        q = exact(piece, torch.zeros(11), k, 2).tolist()
        price_T = torch.tensor(turn(piece.tolist(), q, k)[0])
        margins.append(piece - price_T[:, None])
    expected_E = torch.cat(margins).sort(0, descending=True).values[101 * k // 11].clamp(min=0)
    torch.testing.assert_close(-balancer.bias_E, expected_E, rtol=0, atol=5e-4)


@pytest.mark.parametrize("order", ["old_dual", "paper"])
def test_padding_counts_nowhere(order):
    score_TE, mask_T = torch.rand(101, 11), torch.arange(101) % 3 > 0
    padded, dropped = BIP(11, order=order), BIP(11, order=order)
    garbage_TE = torch.where(mask_T[:, None], score_TE, 0.7)
    assert torch.equal(learn(padded, garbage_TE, 3, mask_T), learn(dropped, score_TE[mask_T], 3))


@pytest.mark.parametrize("order", ["old_dual", "paper"])
def test_nothing_moves_without_rows_or_without_a_choice(order):
    start_E = -torch.rand(5)
    for num_tokens, k, mask_T in [(0, 2, None), (7, 2, torch.zeros(7, dtype=torch.bool)), (7, 5, None)]:
        balancer = BIP(5, order=order)
        balancer.bias_E.copy_(start_E)
        assert torch.equal(learn(balancer, torch.rand(num_tokens, 5), k, mask_T), -start_E)


def test_the_orders_route_by_the_old_price_and_by_the_own_batchs():
    score_TE, start_E, k = torch.rand(101, 11), torch.rand(11) * 0.1, 3
    old, paper = BIP(11, bins=FINE), BIP(11, order="paper", bins=FINE)
    for balancer in (old, paper):
        balancer.bias_E.copy_(-start_E)
    scores, training, evaluation = scores_of(score_TE), call_of(score_TE, k), call_of(score_TE, k, training=False)
    assert torch.equal(old.adjust(training, scores).choice_TE, score_TE - start_E)
    solved_E = exact(score_TE, start_E, k, 4)
    torch.testing.assert_close(paper.adjust(training, scores).choice_TE, score_TE - solved_E, rtol=0, atol=5e-4)
    for balancer in (old, paper):
        assert torch.equal(balancer.adjust(evaluation, scores).choice_TE, score_TE - start_E)
    torch.testing.assert_close(learn(paper, score_TE, k), exact(score_TE, start_E, k, 5), rtol=0, atol=5e-4)
    assert (old.looks_ahead, paper.looks_ahead) == (False, True)


def test_the_papers_order_leaks_and_the_default_does_not():
    x = torch.randn(1, 97, 7)
    for order, leaks in (("old_dual", False), ("paper", True)):
        torch.manual_seed(0)
        layer = MoE(dim=7, hidden_dim=5, num_experts=5, top_k=2, method="bip", order=order, kernel="loop")
        with torch.no_grad():
            assert torch.allclose(layer(x)[:, :40], layer(x[:, :40]), atol=1e-6) != leaks
        assert layer.looks_ahead == leaks


def test_the_layer_routes_with_the_old_price_and_moves_it_after_the_step():
    layer = MoE(dim=7, hidden_dim=5, num_experts=5, top_k=2, method="bip", kernel="loop")
    _, optimizer = attach_still(layer)
    x = torch.randn(97, 7)
    score_TE = (x @ layer.router.weight.T).softmax(-1).detach()
    seen = []
    for _ in range(4):
        q_E = -layer.balancers["bip"].bias_E.clone()
        seen.append(max_vio(score_TE, q_E, 2))
        layer(x).sum().backward()
        load_E = torch.bincount((score_TE - q_E).topk(2).indices.flatten(), minlength=5)
        assert torch.equal(layer.routing.load_E, load_E)
        optimizer.step()
    assert math.isfinite(seen[-1])
    assert seen[-1] < seen[0] / 2


@pytest.mark.parametrize("settings_of", [{"iterations": 0}, {"order": "new"}, {"bins": 0}])
def test_impossible_settings_are_refused(settings_of):
    with pytest.raises(UserError, match=f"bip.{next(iter(settings_of))}="):
        BIP(5, **settings_of)
