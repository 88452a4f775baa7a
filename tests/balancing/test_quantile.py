import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from equipoise import MoE
from equipoise.balancing.quantile import Quantile
from equipoise.errors import UserError
from equipoise.routing.top_k import TopK
from hand_made import attach_still, call_of, scores_of

GOLDEN_TE = torch.tensor(
    [
        [0.90, 0.40, 0.30, 0.20],
        [0.85, 0.55, 0.25, 0.15],
        [0.80, 0.30, 0.35, 0.10],
        [0.70, 0.65, 0.20, 0.25],
        [0.50, 0.75, 0.40, 0.30],
        [0.45, 0.72, 0.55, 0.20],
        [0.30, 0.68, 0.61, 0.35],
        [0.25, 0.40, 0.66, 0.45],
    ]
)


def sigmoid(logit_TE, _):
    return logit_TE.sigmoid()


def statistics_of(balancer, score_TE, k, mask_T=None):
    call = call_of(score_TE, k, mask_T)
    scores = balancer.adjust(call, scores_of(score_TE))
    return balancer.statistics(call, scores, TopK(score_TE.shape[1])(call, scores))


def learn(balancer, score_TE, k, mask_T=None):
    balancer.update(statistics_of(balancer, score_TE, k, mask_T))
    return balancer.bias_E


def load_of(score_TE, bias_E, k):
    return torch.bincount((score_TE + bias_E).topk(k).indices.flatten(), minlength=len(bias_E))


def max_vio(load_E):
    return (load_E.max() / load_E.double().mean() - 1).item()


def exact_bias(score_TE, bias_E, k):
    """One update by sorting: the ceil(T K / E)-th smallest bias with which each expert would win a token; centred."""
    num_tokens, num_experts = score_TE.shape
    biased = [[score + bias for score, bias in zip(row, bias_E.tolist())] for row in score_TE.tolist()]
    alpha = [sorted(row, reverse=True)[k] for row in biased]
    rank = math.ceil(num_tokens * k / num_experts) - 1
    bias = [sorted(alpha[t] - score_TE[t, e].item() for t in range(num_tokens))[rank] for e in range(num_experts)]
    return torch.tensor(bias) - math.fsum(bias) / num_experts


@pytest.mark.parametrize(("bins", "width"), [(1000, 2e-3), (100_000, 2e-5)])
def test_the_golden_example(bins, width):
    assert load_of(GOLDEN_TE, torch.zeros(4), 1).tolist() == [4, 3, 1, 0]
    bias_E = learn(Quantile(4, bins=bins), GOLDEN_TE, 1)
    expected = torch.tensor([-0.2575, -0.0275, 0.0425, 0.2425])
    # Each quantile is off by a width at most, and so is the mean that is taken off.
    torch.testing.assert_close(bias_E, expected, rtol=0, atol=2 * width)


@pytest.mark.parametrize(("cutoff", "loads"), [("lower", [0, 2, 3, 3]), ("mid", [2, 2, 2, 2])])
def test_iterated_on_the_same_scores_the_lower_cutoff_stalls(cutoff, loads):
    balancer = Quantile(4, bins=10_000, cutoff=cutoff)
    for _ in range(30):
        learn(balancer, GOLDEN_TE, 1)
    assert sorted(load_of(GOLDEN_TE, balancer.bias_E, 1).tolist()) == loads


def test_the_middle_cutoff_lies_between_the_kth_and_the_next_score():
    score_TE = torch.rand(101, 11)
    balancer = Quantile(11, bins=100_000, cutoff="mid")
    best_TE = score_TE.sort(1, descending=True).values
    cutoff_T1 = best_TE[:, 2:4].mean(1, keepdim=True)
    required_TE = (cutoff_T1 - score_TE).sort(0).values
    expected_E = required_TE[101 * 3 // 11] - required_TE[101 * 3 // 11].mean()
    torch.testing.assert_close(learn(balancer, score_TE, 3), expected_E, rtol=0, atol=1e-4)


def test_an_unknown_cutoff_is_refused():
    with pytest.raises(UserError, match="lower, mid"):
        Quantile(5, cutoff="upper")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 31), st.integers(2, 7), st.integers(0, 99), st.data())
def test_one_update_is_the_exact_quantile_within_a_bins_width(num_tokens, num_experts, seed, data):
    k, generator = data.draw(st.integers(1, num_experts - 1)), torch.Generator().manual_seed(seed)
    assume(num_tokens * k % num_experts)  # at a whole share every bias between two order statistics is a quantile
    score_TE = torch.rand(num_tokens, num_experts, generator=generator)
    balancer = Quantile(num_experts, bins=500)
    start_E = torch.randn(num_experts, generator=generator) * 0.2
    balancer.bias_E.copy_(start_E)
    width = (start_E.max() - start_E.min() + 2).item() / 500
    expected_E = exact_bias(score_TE, start_E, k)
    torch.testing.assert_close(learn(balancer, score_TE, k), expected_E, rtol=0, atol=2 * width)


def best_even_total(score_TE, k):
    """The highest total score where every token has K experts and every expert its share: a linear program."""
    num_tokens, num_experts = score_TE.shape
    rows = np.kron(np.eye(num_tokens), np.ones((1, num_experts)))
    columns = np.kron(np.ones((1, num_tokens)), np.eye(num_experts))
    share = [k] * num_tokens + [num_tokens * k / num_experts] * num_experts
    score = score_TE.double().numpy().ravel()
    return -linprog(-score, A_eq=np.vstack([rows, columns]), b_eq=share, bounds=(0, 1)).fun


@pytest.mark.parametrize("k", [1, 3])
def test_its_dual_bounds_the_linear_program_and_reaches_it(k):
    """By any bias the K best biased scores, less the biases' shares, are no less than the even optimum."""
    score_TE = (torch.randn(61, 7) + torch.randn(7)).sigmoid()
    balancer, best = Quantile(7, bins=20_000, cutoff="mid"), best_even_total(score_TE, k)
    values = []
    for _ in range(16):
        bias_E = balancer.bias_E.double()
        values.append(float((score_TE + bias_E).topk(k).values.sum() - 61 * k / 7 * bias_E.sum()))
        learn(balancer, score_TE, k)
    assert min(values) >= best - 1e-6
    assert values[0] > best * 1.02
    assert values[-1] < best * 1.005


@pytest.mark.parametrize(
    ("num_experts", "k", "score", "bins"), [(16, 4, torch.softmax, 100_000), (64, 8, sigmoid, 1000)]
)
def test_four_iterations_on_the_own_batch_balance_it(num_experts, k, score, bins):
    # Softmax scores are a sixteenth in the mean, so that bins of the default width would be too coarse for them.
    score_TE = score(torch.randn(8192, num_experts) + torch.randn(num_experts), 1)
    balancer = Quantile(num_experts, bins=bins)
    start = max_vio(load_of(score_TE, balancer.bias_E, k))
    seen = [max_vio(load_of(score_TE, learn(balancer, score_TE, k), k)) for _ in range(4)]
    assert start > 1
    assert seen[0] < 0.5
    assert seen[3] < 0.05


@pytest.mark.parametrize("shift", [-3.0, 0.25])
def test_a_constant_on_every_bias_changes_nothing(shift):
    score_TE = torch.rand(101, 11)
    start_E = torch.randn(11) * 0.2
    plain, shifted = Quantile(11), Quantile(11)
    plain.bias_E.copy_(start_E)
    shifted.bias_E.copy_(start_E + shift)
    width = (start_E.max() - start_E.min() + 2).item() / 1000
    torch.testing.assert_close(learn(plain, score_TE, 3), learn(shifted, score_TE, 3), rtol=0, atol=width)


def test_permuting_the_experts_permutes_the_biases():
    score_TE, order_E = torch.rand(101, 11), torch.randperm(11)
    plain, permuted = Quantile(11), Quantile(11)
    for _ in range(3):
        learn(plain, score_TE, 3)
        learn(permuted, score_TE[:, order_E], 3)
    torch.testing.assert_close(permuted.bias_E, plain.bias_E[order_E], rtol=0, atol=1e-6)


def test_the_biases_are_centred():
    bias_E = learn(Quantile(11), torch.rand(101, 11) * torch.linspace(0.2, 1, 11), 3)
    assert bias_E.abs().max() > 0.05
    assert bias_E.sum().item() == pytest.approx(0, abs=1e-6)


def test_micro_batches_add_up_to_the_batch_exactly():
    score_TE, whole, split = torch.rand(101, 11), Quantile(11), Quantile(11)
    for _ in range(3):
        learn(whole, score_TE, 3)
        pieces = [statistics_of(split, piece, 3) for piece in score_TE.split([1, 60, 40])]
        split.update({name: sum(piece[name] for piece in pieces) for name in pieces[0]})
        assert torch.equal(whole.bias_E, split.bias_E)


def test_padding_counts_nowhere():
    score_TE, mask_T = torch.rand(101, 11), torch.arange(101) % 3 > 0
    padded, dropped = Quantile(11), Quantile(11)
    garbage_TE = torch.where(mask_T[:, None], score_TE, 7.0)
    assert torch.equal(learn(padded, garbage_TE, 3, mask_T), learn(dropped, score_TE[mask_T], 3))


def test_ema_keeps_a_share_of_the_old_bias():
    score_TE, start_E = torch.rand(101, 11), torch.randn(11) * 0.2
    plain, smooth = Quantile(11), Quantile(11, ema=0.9)
    for balancer in (plain, smooth):
        balancer.bias_E.copy_(start_E)
    expected_E = 0.9 * start_E + 0.1 * learn(plain, score_TE, 3)
    torch.testing.assert_close(learn(smooth, score_TE, 3), expected_E, rtol=0, atol=1e-7)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_nothing_moves_without_rows_or_without_a_choice(ema):
    start_E = torch.randn(5)
    for num_tokens, k, mask_T in [(0, 2, None), (7, 2, torch.zeros(7, dtype=torch.bool)), (7, 5, None)]:
        balancer = Quantile(5, ema=ema)
        balancer.bias_E.copy_(start_E)
        assert torch.equal(learn(balancer, torch.rand(num_tokens, 5), k, mask_T), start_E)


def test_the_layer_routes_with_the_old_bias_and_moves_it_after_the_step():
    layer = MoE(dim=7, hidden_dim=5, num_experts=5, top_k=2, method="quantile", kernel="loop")
    _, optimizer = attach_still(layer)
    x = torch.randn(97, 7)
    score_TE = (x @ layer.router.weight.T).sigmoid().detach()
    loads = []
    for _ in range(4):
        layer(x).sum().backward()
        loads.append(layer.routing.load_E)
        assert torch.equal(layer.routing.load_E, load_of(score_TE, layer.balancers["quantile"].bias_E, 2))
        optimizer.step()
    assert max_vio(loads[-1]) < max_vio(loads[0]) / 2
