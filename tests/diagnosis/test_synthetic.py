from dataclasses import replace

import numpy as np
import pytest

from equipoise.diagnosis.synthetic import Workload, make_loads, make_trace
from equipoise.errors import UserError

SMALL = Workload(layers=2, num_experts=16, windows=4, tokens=4096, top_k=2)


def test_the_seed_decides():
    for make in (make_trace, make_loads):
        np.testing.assert_array_equal(make(SMALL).load_WLE, make(SMALL).load_WLE)
        assert (make(SMALL).load_WLE != make(replace(SMALL, seed=1)).load_WLE).any()


def test_every_token_has_distinct_experts_and_counts_once():
    trace = make_trace(SMALL)
    assert (trace.load_WLE.sum(2) == 4096 * 2).all()
    assert (trace.expert_TLK[:, :, 0] != trace.expert_TLK[:, :, 1]).all()


@pytest.mark.parametrize("zipf", [0.0, 0.7, 1.2])
def test_popularity_falls_with_the_rank_as_zipf_says(zipf):
    trace = make_loads(replace(SMALL, zipf=zipf, drift=0.0, top_k=1, tokens=200_000))
    share_E = np.sort(trace.load_WLE.sum(0)[0])[::-1] / trace.load_WLE[:, 0].sum()
    expected_E = np.arange(1, 17) ** -zipf / (np.arange(1, 17) ** -zipf).sum()
    np.testing.assert_allclose(share_E, expected_E, rtol=0.03)


def test_single_draws_have_the_same_popularity():
    workload = replace(SMALL, zipf=1.0, drift=0.0, top_k=1, tokens=50_000)
    share, tokens = (make(workload).load_WLE.sum(0) / 200_000 for make in (make_loads, make_trace))
    np.testing.assert_allclose(np.sort(tokens), np.sort(share), atol=0.004)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one / one.sum() - other / other.sum()).sum())


def test_drift_moves_the_loads_on_and_none_leaves_them():
    still, moving = (make_loads(replace(SMALL, windows=20, drift=drift)).load_WLE[:, 0] for drift in (0.0, 0.3))
    assert distance(still[0], still[-1]) < 0.1
    assert distance(moving[0], moving[1]) < distance(moving[0], moving[-1])
    assert distance(moving[0], moving[-1]) > 0.4


def test_domains_take_turns():
    trace = make_trace(replace(SMALL, domains=2, switch_every=1, drift=0.0, zipf=1.2))
    first, second, third, _ = trace.load_WLE[:, 0]
    assert distance(first, third) < 0.1 < 0.5 < distance(first, second)
    assert trace.domain_T.reshape(4, -1)[:, 0].tolist() == [0, 1, 0, 1]


def test_affinity_is_the_share_of_tokens_that_go_to_partners():
    for affinity in (0.0, 0.6, 1.0):
        trace = make_trace(replace(SMALL, affinity=affinity, zipf=0.0, drift=0.0, top_k=1))
        follows = trace.transition_MEE[0].max(1).sum() / trace.transition_MEE[0].sum()
        assert follows == pytest.approx(affinity + (1 - affinity) / 16, abs=0.02)


@pytest.mark.parametrize(
    "changes",
    [{"layers": 0}, {"windows": 0}, {"tokens": -1}, {"top_k": 17}, {"affinity": 1.5}, {"zipf": -1.0}, {"domains": 0}],
)
def test_numbers_that_make_no_sense_are_refused(changes):
    with pytest.raises(UserError):
        Workload(**({"num_experts": 16} | changes))
