import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

from equipoise.routing.assignment import assign
from hand_made import awkward_logits


def best_total(score, k):
    """The optimum by linear programming, whose corners are whole numbers."""
    num_tokens, num_experts = score.shape
    rows = np.kron(np.eye(num_tokens), np.ones((1, num_experts)))
    columns = np.kron(np.ones((1, num_tokens)), np.eye(num_experts))
    most = [-(-num_tokens * k // num_experts)] * num_experts
    least = [-(num_tokens * k // num_experts)] * num_experts
    limits = {"A_ub": np.vstack([columns, -columns]), "b_ub": most + least, "A_eq": rows, "b_eq": [k] * num_tokens}
    return -linprog(-score.ravel(), bounds=(0, 1), **limits).fun


def check(score, k):
    chosen = assign(score, k)
    num_tokens, num_experts = score.shape
    assert (chosen.sum(1) == k).all()
    assert set(chosen.sum(0).tolist()) <= {num_tokens * k // num_experts, -(-num_tokens * k // num_experts)}
    return (score.astype(np.float64) * chosen).sum()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 19), st.integers(1, 6), st.integers(0, 9999), st.sampled_from([0, 5]), st.booleans(), st.data())
def test_it_is_the_best_with_equal_loads(num_tokens, num_experts, seed, skew, ties, data):
    k, random = data.draw(st.integers(1, num_experts)), np.random.default_rng(seed)
    score = random.standard_normal((num_tokens, num_experts)) + skew * random.standard_normal(num_experts)
    score = score.round() if ties else score
    assert check(score, k) == pytest.approx(best_total(score, k), abs=1e-8)


@pytest.mark.parametrize("skew", [0, 3, 30])
def test_larger_ones_match_the_assignment_of_tokens_to_slots(skew):
    random = np.random.default_rng(skew)
    score = random.standard_normal((210, 7)) + skew * random.standard_normal(7)
    slots = np.repeat(score, 30, axis=1)
    expected = slots[linear_sum_assignment(slots, maximize=True)].sum()
    assert check(score, 1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", awkward_logits(5))
@pytest.mark.parametrize("k", [1, 2, 5])
def test_awkward_scores(name, k):
    score = awkward_logits(5)[name].numpy()
    assert check(score, k) == pytest.approx(best_total(score.astype(np.float64), k), rel=1e-6, abs=1e-6)


def test_no_tokens_get_nothing():
    assert assign(np.zeros((0, 5)), 2).shape == (0, 5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_never_searched(bad):
    score = np.zeros((32, 8))
    score[5, 3] = bad
    with pytest.raises(AssertionError):
        assign(score, 2)


def test_no_finite_score_is_too_large():
    score = np.random.default_rng(0).standard_normal((32, 8))
    large = score * (1.7e308 / np.abs(score).max())
    assert (assign(large, 2) == assign(score, 2)).all()
