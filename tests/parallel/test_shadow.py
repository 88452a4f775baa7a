"""FasterMoE's shadowing against its latency model."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.parallel import Native, Shadow

# Weights: 2 * 5 * 10 = 100 values, 400 bytes: 4 s per broadcast at 100 bytes/s. A row: 200 operations, 0.2 s at 1000
# per second, three times; messages of 20 bytes, 0.2 s each, four times: 1.4 s.
SETTINGS = {"dim": 5, "hidden_dim": 10, "bandwidth": 100.0, "flops": 1000.0}


def test_the_walk_stops_at_the_first_expert_that_does_not_pay():
    # 20 -> 12 saves 11.2 s for 4 s; 12 -> 10 saves 2.8 s: no. That 10 -> 0 would save 14 s is not looked at.
    assert Shadow(**SETTINGS).shadowed(np.array([10, 20, 0, 12])) == [1]
    assert Shadow(**SETTINGS).shadowed(np.array([2, 20, 0, 12])) == [1, 3]
    assert Shadow(**SETTINGS).shadowed(np.array([10, 12, 12, 11])) == []
    assert Shadow(**SETTINGS).shadowed(np.array([50])) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=9))
def test_as_the_published_loop_has_it(loads):
    order = sorted(range(len(loads)), key=lambda expert: (-loads[expert], expert))
    best, shadowed = 1.4 * loads[order[0]], []
    for count, (expert, following) in enumerate(itertools.pairwise(order), start=1):
        latency = 1.4 * loads[following] + 4 * count
        if latency >= best - 1e-9:
            break
        best = latency
        shadowed.append(expert)
    assert Shadow(**SETTINGS).shadowed(np.array(loads)) == shadowed


def test_every_rank_computes_its_own_rows_of_a_shadowed_expert():
    load_RE = np.array([[1, 7, 0, 2], [0, 8, 2, 0], [1, 5, 0, 1]])
    owner_E = np.array([0, 1, 2, 0])
    plan = Shadow(**SETTINGS).plan(load_RE, owner_E)
    plan.check(load_RE)
    assert plan.segments[1] == [(0, 0, 7), (1, 7, 15), (2, 15, 20)]
    assert plan.transfers == [(1, 1, 0), (1, 1, 2)]
    native = Native().plan(load_RE, owner_E)
    assert [plan.segments[expert] for expert in (0, 2, 3)] == [native.segments[expert] for expert in (0, 2, 3)]


def test_three_matrices_and_half_the_bytes():
    # SwiGLU in bf16: broadcast 3 s; a row: 3 * 0.3 + 4 * 0.1 = 1.3 s. 15 -> 12 pays (3.9 s for 3 s), 12 -> 10 does not.
    swiglu = Shadow(**SETTINGS, matrices=3, value_bytes=2)
    assert swiglu.shadowed(np.array([15, 12, 10])) == [0]
    assert Shadow(**SETTINGS).shadowed(np.array([15, 13, 10])) == []


def test_one_rank_shadows_nothing_and_settings_must_be_positive():
    assert Shadow(**SETTINGS).plan(np.array([[50, 0]]), np.array([0, 0])).transfers == []
    with pytest.raises(UserError, match="positive"):
        Shadow(dim=0, hidden_dim=1).shadowed(np.array([1]))
