"""Loads: totals, shares, and tokens that have an expert once against tokens that are drawn."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.diagnosis.synthetic import Workload, make_loads
from equipoise.errors import UserError
from equipoise.simulator import Shape, parse_workload
from equipoise.simulator.workload import check_fits, rank_loads, without_repeats

SHAPE = Shape(dim=2, hidden_dim=3, num_experts=11, top_k=3, num_layers=2)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(0, 9999), ranks=st.integers(1, 13))
def test_rows_are_shared_out_to_the_last(seed, rows, ranks):
    load_E = np.random.default_rng(seed).random(7) + 0.01
    load_RE = rank_loads(load_E, rows, ranks)
    assert load_RE.shape == (ranks, 7)
    assert load_RE.sum() == rows
    assert np.abs(load_RE.sum(0) - rows * load_E / load_E.sum()).max() < 1
    assert (load_RE.max(0) - load_RE.min(0)).max() <= 1


def test_odd_rows_go_to_the_largest_remainders():
    assert rank_loads(np.array([5, 3, 2]), 4, 2).tolist() == [[1, 0, 0], [1, 1, 1]]


def test_tokens_have_an_expert_once():
    made = make_loads(Workload(layers=1, num_experts=11, top_k=3, windows=1, tokens=100_000, zipf=1.5))
    popular_E = made.load_WLE[0, 0] / made.load_WLE.sum()
    # The oracle draws three different experts per token, one after the other.
    noisy_TE = np.log(popular_E) + np.random.default_rng(1).gumbel(size=(200_000, 11))
    drawn_E = np.bincount(np.argpartition(-noisy_TE, 2, axis=1)[:, :3].ravel(), minlength=11) / 200_000
    visits_E = without_repeats(made, 3).load_WLE[0, 0] / 100_000
    assert popular_E.max() * 3 > 1.2  # drawn independently, the first would have more rows than tokens
    assert visits_E.max() < 1
    assert visits_E.sum() == pytest.approx(3, abs=1e-4)
    np.testing.assert_allclose(visits_E, drawn_E, atol=0.03)


def test_hot_and_balanced():
    load_WLE = parse_workload("hot:0.6:2", SHAPE, windows=3).load_WLE
    assert load_WLE.shape == (3, 2, 11)
    np.testing.assert_allclose(load_WLE[0, 0], [0.3] * 2 + [0.4 / 9] * 9)
    np.testing.assert_allclose(parse_workload("balanced", SHAPE).load_WLE, 1 / 11)


def test_zipf_is_skewed_drifts_and_has_its_seed():
    one, again, other = (parse_workload("zipf:1.2:0.3", SHAPE, 2, seed).load_WLE for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert (one[0] != one[1]).any()
    assert one.max() / one.mean() > 2
    assert parse_workload("zipf:0:0", SHAPE).load_WLE.std() < 0.01 * one.mean()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("zip:1.2", "did you mean 'zipf'"),
        ("zipf", "Give the workload as zipf:1.2"),
        ("zipf:1:2:3", "Give the workload as zipf:1.2"),
        ("zipf:much", "'much' in the workload"),
        ("zipf:nan", "'nan' in the workload"),
        ("zipf:-1", "'-1' in the workload"),
        ("hot:0.5", "Give the workload as hot:0.5:4"),
        ("hot:1.5:4", "must be from 0 to 1, not 1.5"),
        ("hot:0.5:11", "whole number below 11"),
        ("hot:0.5:1.5", "whole number below 11"),
        ("balanced:1", "Give the workload as balanced"),
    ],
)
def test_a_workload_that_is_none_is_refused(text, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        parse_workload(text, SHAPE)


def test_a_trace_that_does_not_fit_is_refused():
    trace = parse_workload("balanced", SHAPE)
    check_fits(trace, SHAPE, 11)
    with pytest.raises(UserError, match="11 experts cannot be spread over expert-parallel groups of 12"):
        check_fits(trace, SHAPE, 12)
    for change, words in (
        ({"num_experts": 12}, "has 11 experts"),
        ({"top_k": 2}, "3 experts per token"),
        ({"num_layers": 3}, "has 2 layers"),
    ):
        with pytest.raises(UserError, match=words):
            check_fits(trace, replace(SHAPE, **change), 4)
    silent = trace.load_WLE.copy()
    silent[1, 0] = 0
    with pytest.raises(UserError, match="no rows in window 1"):
        check_fits(replace(trace, load_WLE=silent), SHAPE, 4)
