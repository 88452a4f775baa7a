import ot
import pytest
import torch

from equipoise.routing.transport import sinkhorn
from hand_made import awkward_logits


def never(before_E, after_E):
    return torch.zeros((), dtype=torch.bool)


def plan_of(score_TE, f_T, g_E):
    return (score_TE + f_T[:, None] + g_E).exp()


@pytest.mark.parametrize("xi", [1.0, 0.2])
@pytest.mark.parametrize("rows_first", [False, True])
def test_the_plan_is_that_of_another_library(xi, rows_first):
    cost_TE = torch.randn(23, 5, dtype=torch.float64)
    potentials = sinkhorn(cost_TE / xi, None, 300, never, rows_first)
    marginals = torch.ones(23, dtype=torch.float64), torch.full((5,), 23 / 5, dtype=torch.float64)
    expected_TE = ot.sinkhorn(*marginals, -cost_TE, xi, method="sinkhorn_log", stopThr=1e-10, numItermax=10_000)
    torch.testing.assert_close(plan_of(cost_TE / xi, *potentials), expected_TE, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in awkward_logits(5) if name != "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_exact_whatever_the_logits(name, dtype):
    score_TE = awkward_logits(5)[name].to(dtype)
    plan_TE = plan_of(score_TE, *sinkhorn(score_TE, None, 50, never))
    torch.testing.assert_close(plan_TE.sum(1), torch.ones(len(plan_TE), dtype=dtype), rtol=1e-3, atol=0)


def test_padding_is_in_no_sum():
    score_TE, mask_T = torch.randn(23, 5, dtype=torch.float64), torch.arange(23) % 3 > 0
    garbage_TE = torch.where(mask_T[:, None], score_TE, 50.0)
    plan_TE = plan_of(garbage_TE, *sinkhorn(garbage_TE, mask_T, 300, never))
    alone_TE = plan_of(score_TE[mask_T], *sinkhorn(score_TE[mask_T], None, 300, never))
    torch.testing.assert_close(plan_TE[mask_T], alone_TE, rtol=1e-9, atol=1e-12)
    assert plan_TE[~mask_T].eq(0).all()


@pytest.mark.parametrize("mask_T", [None, torch.zeros(4, dtype=torch.bool)])
def test_without_real_tokens_nothing_is_infinite(mask_T):
    score_TE = torch.zeros(0 if mask_T is None else 4, 5)
    f_T, _ = sinkhorn(score_TE, mask_T, 5, never)
    assert f_T.isfinite().all()


def test_it_stops_where_it_is_told_to():
    score_TE, seen = torch.randn(23, 5), []

    def third(before_E, after_E):
        seen.append(after_E)
        return torch.tensor(len(seen) == 3)

    _, g_E = sinkhorn(score_TE, None, 50, third)
    assert len(seen) == 3
    assert torch.equal(g_E, sinkhorn(score_TE, None, 3, never)[1])


def test_a_graph_stands_still_where_a_plain_call_stops():
    """Traced, the loop runs on, and its answer is that of the iteration that converged."""
    score_TE = torch.randn(23, 5, dtype=torch.float64)

    def close(before_E, after_E):
        return (after_E - before_E).abs().max() < 1e-2

    def traced(score_TE):
        return sinkhorn(score_TE, None, 50, close)

    graph = torch.fx.experimental.proxy_tensor.make_fx(traced, tracing_mode="fake")(score_TE)
    assert "lift_fresh" not in graph.code, "a copy of the host's number, which a device would wait for"
    for actual, expected in zip(graph(score_TE), traced(score_TE)):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(sinkhorn(score_TE, None, 50, never)[1], traced(score_TE)[1], atol=1e-6)
