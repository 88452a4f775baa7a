"""What the bias tells of its steps: the dual and its bound, overshoots, the spread and its alarm."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from equipoise import MoE, load_stats
from equipoise.balancing.bias import Bias
from equipoise.routing.top_k import TopK
from hand_made import call_of, scores_of


def scores_with_offsets(num_tokens, num_experts):
    """Sigmoid scores, fp64, of Gaussian logits with an offset per expert."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"dtype": torch.float64, "generator": generator}
    return (torch.randn(num_experts, **sizes) + torch.randn(num_tokens, num_experts, **sizes)).sigmoid()


def step_of(balancer, score_TE, k, step=0):
    """One step of the layer's parts, the bias moved by it; returns the load that it moved by."""
    call = replace(call_of(score_TE, k), step=torch.tensor(step))
    scores = balancer.adjust(call, scores_of(score_TE))
    routing = TopK(len(balancer.bias_E))(call, scores)
    balancer.update(balancer.statistics(call, scores, routing))
    return routing.load_E


STEPS = [
    {"rate": 1e-3},
    {"rate": 1e-2, "centre": True},
    {"rate": 3e-2, "schedule": "inverse_sqrt"},
    {"rate": 3e-2, "rule": "linear"},
    {"rate": 3e-2, "rule": "linear", "schedule": "inverse_sqrt"},  # primal_dual
    {"rate": 0.1, "rule": "linear", "centre": True},
    {"rate": 1e-2, "rule": "rms"},
    {"rate": 0.1, "rule": "rms", "schedule": "inverse"},
]


def dual_of(score_TE, bias_E, k):
    """D(b) = sum of each token's k best biased scores - L sum b."""
    fair = k * len(score_TE) / len(bias_E)
    return ((score_TE + bias_E).topk(k).values.sum() - fair * bias_E.sum()).item()


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("settings", STEPS, ids=str)
def test_the_dual_moves_within_its_two_sided_bound(k, settings):
    # Convexity bounds every step d of the bias: <c - L, d> <= D(b + d) - D(b) <= <c' - L, d>, c and c' being the loads
    # before and after: D must fall where the right side is negative, and may rise elsewhere. Here are 4,000 steps.
    score_TE, balancer, fair = scores_with_offsets(211, 16), Bias(16, **settings), 211 * k / 16
    before, lower, moved_E, uppers = dual_of(score_TE, balancer.bias_E.double(), k), 0.0, torch.zeros(16).double(), []
    for step in range(250):
        bias_E = balancer.bias_E.double()
        dual, load_E = dual_of(score_TE, bias_E, k), step_of(balancer, score_TE, k, step)
        uppers.append(((load_E - fair) * moved_E).sum().item())
        assert lower - 1e-9 <= dual - before <= uppers[-1] + 1e-9
        if "rule" in settings:
            assert balancer.readings()["dual"].item() == pytest.approx(dual / 211, rel=1e-6)
        before, moved_E = dual, balancer.bias_E.double() - bias_E
        lower = ((load_E - fair) * moved_E).sum().item()
    assert sum(upper < -1e-6 for upper in uppers) >= 3, "the condition under which the dual falls should have held"
    clear, all_but_falls = sum(upper > 1e-6 for upper in uppers), sum(upper > -1e-6 for upper in uppers)
    assert clear <= balancer.readings()["overshoots"] <= all_but_falls


def test_steps_that_are_too_long_overshoot_and_raise_the_dual():
    score_TE, rose = scores_with_offsets(211, 16), {}
    for rate in (0.003, 0.5):
        balancer, dual = Bias(16, rate=rate, rule="linear", alarm=0.0), []
        for _ in range(100):
            step_of(balancer, score_TE, 4)
            dual.append(balancer.readings()["dual"].item())
        rose[rate] = sum(after > before for before, after in pairwise(dual))
        assert rose[rate] <= balancer.readings()["overshoots"].item()
    assert rose[0.003] == 0
    assert rose[0.5] > 30


def test_the_dual_is_read_of_a_whole_window_without_padding():
    score_TE, mask_T = torch.rand(101, 11), torch.arange(101) % 3 > 0
    bias_E, readings = torch.randn(11) * 0.2, []
    for pieces in ([(score_TE[mask_T], None)], list(zip(score_TE.split([1, 60, 40]), mask_T.split([1, 60, 40])))):
        balancer, found = Bias(11, rule="linear"), []
        balancer.bias_E.copy_(bias_E)
        for piece_TE, piece_T in pieces:
            call = call_of(piece_TE, 3, piece_T)
            scores = balancer.adjust(call, scores_of(piece_TE))
            found.append(balancer.statistics(call, scores, TopK(11)(call, scores)))
        balancer.update({name: sum(each[name] for each in found) for name in found[0]})
        readings.append(balancer.readings()["dual"].item())
    expected = dual_of(score_TE[mask_T].double(), bias_E.double(), 3) / int(mask_T.sum())
    assert readings == pytest.approx([expected, expected], rel=1e-5)


def test_readings_before_and_after_steps_without_rows():
    balancer = Bias(5, rule="linear")
    balancer.bias_E.copy_(torch.tensor([0.25, -0.5, 0, 0, 0.125]))
    assert {name: value.item() for name, value in balancer.readings().items()} == {"spread": 0.75, "overshoots": 0}
    step_of(balancer, torch.zeros(0, 5), 2)
    assert {name: value.item() for name, value in balancer.readings().items()} == {
        "spread": 0.75,
        "overshoots": 0,
        "dual": 0,
    }


def test_a_wide_spread_alarms_once_where_it_is_read():
    layer = MoE(dim=7, hidden_dim=5, num_experts=5, top_k=2, method="loss_free")
    layer(torch.randn(11, 7))
    layer.balancers["bias"].bias_E.copy_(torch.tensor([0.4, -0.5, 0, 0, 0]))
    assert load_stats(layer)[""].readings["bias.spread"] == pytest.approx(0.9)  # every warning is an error here
    layer.balancers["bias"].bias_E[0] = 0.5
    with pytest.warns(UserWarning, match=r"lie 1 or more apart \(bias.alarm\).*lower bias.rate"):
        load_stats(layer)
    load_stats(layer)


@pytest.mark.parametrize(("alarm", "spread"), [(0.0, 9.0), (9.5, 9.0)])
def test_the_alarm_may_be_moved_or_switched_off(alarm, spread):
    balancer = Bias(5, alarm=alarm)
    balancer.bias_E[3] = spread
    assert balancer.readings()["spread"] == spread
