"""Whole simulations: what must hold on any machine, what policies may know, and what is refused."""

import re
from dataclasses import replace

import numpy as np
import pytest
from tiny_machine import IDEAL, SHAPE, tiny

from equipoise.errors import UserError
from equipoise.parallel import LeastLoaded, Native, ShardedSparse
from equipoise.simulator import PHASES, POLICIES, Policy, Settings, Software, parse_workload, read_cluster, simulate
from equipoise.simulator.simulation import layers_to_simulate

SMALL = replace(SHAPE, num_experts=11, top_k=2, num_layers=3, other_params=9.0)
SETTINGS = Settings(shape=SMALL, tokens=101, windows=3)


class Spy:
    """Native, and remembers the histories that it was shown."""

    window = 5

    def __init__(self):
        self.histories = []

    def plan(self, load_RE, owner_E, history_WE=None):
        self.histories.append(history_WE)
        return Native().plan(load_RE, owner_E)


def test_every_policy_in_one_simulation():
    simulation = simulate("zipf:1.2", tiny(8, Software()), settings=SETTINGS)
    assert tuple(simulation.outcomes) == POLICIES
    assert simulation.settings.ep == 8
    for outcome in simulation.outcomes.values():
        assert outcome.seconds == pytest.approx(outcome.phase_seconds_P.sum())
        # A rank works or waits: both together are the step.
        np.testing.assert_allclose(outcome.own_PR.sum(0) + outcome.waiting_RR.sum(1), outcome.seconds)
        assert not outcome.waiting_RR.diagonal().any()
        assert 0 <= outcome.waiting < 1
        assert outcome.imbalance <= outcome.worst_imbalance
    assert simulation.speedup("native") == 1.0
    assert simulation.outcomes["least-loaded"].imbalance < simulation.outcomes["native"].imbalance


def test_balanced_loads_leave_nothing_to_gain():
    balanced = Settings(shape=replace(SMALL, num_experts=16), tokens=96)
    simulation = simulate("balanced", tiny(8, Software()), "native,least-loaded", balanced)
    assert simulation.speedup("least-loaded") == pytest.approx(1, abs=1e-9)
    assert simulation.outcomes["native"].imbalance == pytest.approx(1, abs=0.01)


def test_a_step_worked_out_by_hand():
    # Two ranks, all 8 rows for expert 0 of rank 0: 8 s; 4 rows of 2 bytes travel there and back.
    shape = replace(SHAPE, num_experts=2)
    simulation = simulate("hot:1:1", tiny(2), "native", Settings(shape=shape, tokens=4, training=False))
    outcome = simulation.outcomes["native"]
    assert outcome.seconds == pytest.approx(8 + 2 * 8 / 100)
    assert outcome.phase_seconds_P[PHASES.index("experts")] == pytest.approx(8)
    assert outcome.waiting_RR.tolist() == [[0, 0], [pytest.approx(8), 0]]
    # Rank 0: one expert of 18 bytes and 8 rows of 2 * 2 + 3 * 3 bytes.
    assert outcome.peak_bytes_R.tolist() == [18 + 8 * 13, 18]


def test_memory_of_training_by_hand():
    shape = replace(SHAPE, num_experts=2, num_layers=3)
    outcome = simulate("hot:1:1", tiny(2), "native", Settings(shape=shape, tokens=4)).outcomes["native"]
    # Three layers of 8 bytes per weight, 8 bytes per saved row, and one layer that computes.
    assert outcome.peak_bytes_R.tolist() == [3 * 18 * 8 + 3 * 8 * 8 + 8 * 13, 3 * 18 * 8]


@pytest.mark.parametrize(("rematerialise", "layers"), [(False, 3), (True, 1)])
def test_memory_of_weights_that_were_sent(rematerialise, layers):
    shape = replace(SHAPE, num_experts=2, num_layers=3)
    planner = ShardedSparse(overlap=2, slots=1, rematerialise=rematerialise)
    outcome = simulate("balanced", tiny(2), {"a": planner}, Settings(shape=shape, tokens=4)).outcomes["a"]
    # Each rank has 4 rows of its own, an expert, and the other one: in every layer, or in one at a time.
    assert outcome.peak_bytes_R.tolist() == [3 * 18 * 8 + layers * 18 + 3 * 4 * 8 + 4 * 13] * 2


def test_least_loaded_evens_out_over_nodes():
    settings = Settings(shape=replace(SMALL, dim=512, hidden_dim=512, num_experts=64), tokens=4096, windows=1)
    outcomes = simulate("hot:0.9:1", "h200x8:32", "native,least-loaded", settings).outcomes
    assert outcomes["native"].imbalance > 28
    assert outcomes["least-loaded"].imbalance < 4  # whole chunks are larger than a fair share here


def test_groups_that_repeat_reduce_their_gradients():
    shape = replace(SHAPE, num_experts=2)
    alone = simulate("hot:1:1", tiny(2), "native", Settings(shape=shape, tokens=4)).outcomes["native"].seconds
    for ranks in (4, 6):
        repeated = simulate("hot:1:1", tiny(ranks), "native", Settings(shape=shape, tokens=4, ep=2))
        assert repeated.replicas == ranks // 2
        assert repeated.outcomes["native"].seconds == alone  # hidden behind 16 s of backward pass
    slow = tiny(4, replace(IDEAL, weight_efficiency=0.01))
    exposed = simulate("hot:1:1", slow, "native", Settings(shape=shape, tokens=4, ep=2)).outcomes["native"].seconds
    # A ring of two moves 18 bytes at 0.1 bytes per second, of which the backward pass hides its own length.
    assert exposed == pytest.approx(alone + 18 / (10 * 0.01) - (16 + 2 * 8 / 100))


def test_who_decides_ahead_sees_earlier_windows_only():
    trace = parse_workload("zipf:1:0.5", SMALL, windows=3)
    spy = Spy()
    outcome = simulate(trace, tiny(8), {"spy": spy}, SETTINGS).outcomes["spy"]
    expected = [trace.load_WLE[:window, layer] for window in (1, 2) for layer in range(3)]
    assert len(spy.histories) == len(expected)
    for seen, right in zip(spy.histories, expected):
        rows = 8 * 101 * 2 * len(right)  # of the cluster, whose steps are smaller than the trace's
        np.testing.assert_allclose(seen, right * (rows / right.sum()), atol=0.5)
    assert not outcome.foresight


def test_foresight_is_admitted():
    spy = Spy()
    outcomes = simulate("zipf:1", tiny(8), {"spy": spy, "native": Native()}, replace(SETTINGS, windows=1)).outcomes
    assert spy.histories == [None] * 3
    assert outcomes["spy"].foresight
    assert not outcomes["native"].foresight


def test_planners_of_ones_own_with_and_without_a_way_to_travel():
    planner = ShardedSparse(overlap=4, slots=1, ranks_per_node=2)
    given = {"alone": planner, "handed on": Policy(planner=planner, broadcast=True)}
    slow = tiny(8, replace(IDEAL, weight_efficiency=0.01))
    outcomes = simulate("zipf:1.2", slow, given, SETTINGS).outcomes
    assert outcomes["alone"].transfers == outcomes["handed on"].transfers > 0
    assert outcomes["alone"].seconds > outcomes["handed on"].seconds


def test_a_better_machine_is_never_slower():
    seconds = [
        simulate("zipf:1.2", cluster, {"a": LeastLoaded(min_rows=1)}, SETTINGS).outcomes["a"].seconds
        for cluster in (tiny(8, Software()), tiny(8, Software(), flops=72.0), tiny(8))
    ]
    assert seconds[0] > seconds[1] > 0
    assert seconds[0] > seconds[2]


def test_equal_simulations_are_equal_and_progress_is_told():
    told = []
    one = simulate("zipf:1.2", "h200x8:8", "native,shadow", SETTINGS, told.append)
    two = simulate("zipf:1.2", "h200x8:8", ["native", "shadow"], SETTINGS)
    assert [o.seconds for o in one.outcomes.values()] == [o.seconds for o in two.outcomes.values()]
    assert told == ["native"] * 6 + ["shadow"] * 6
    assert layers_to_simulate("zipf:1.2", SETTINGS) == 6
    assert layers_to_simulate(parse_workload("balanced", SMALL, 1), SETTINGS) == 3


@pytest.mark.parametrize(
    ("ranks", "experts", "ep"), [(4096, 384, 256), (3840, 384, 384), (16, 11, 8), (4096, 4096, 256)]
)
def test_the_group_is_the_largest_that_divides(ranks, experts, ep):
    shape = replace(SHAPE, num_experts=experts)
    settings = Settings(shape=shape, tokens=4, windows=1)
    assert simulate("balanced", tiny(ranks), "native", settings).settings.ep == ep


@pytest.mark.parametrize(
    ("policies", "changes", "sentence"),
    [
        ("natve", {}, "Unknown policy 'natve' (did you mean 'native'?)"),
        ("native,native", {}, "given twice"),
        ("", {}, "Unknown policy ''"),
        ({}, {}, "Give a policy"),
        ("native", {"ep": 3}, "do not divide the cluster's 8; the nearest size that does: 2"),
        ("native", {"ep": 0}, "ep must be at least 1"),
        ("native", {"tokens": 0}, "tokens must be at least 1"),
        ("native", {"windows": 0}, "windows must be at least 1"),
        ("native", {"shape": "deepsek-v3"}, "did you mean 'deepseek-v3'"),
    ],
)
def test_what_makes_no_sense_is_refused(policies, changes, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        simulate("balanced", tiny(8), policies, replace(SETTINGS, **changes))


@pytest.mark.slow
def test_sixty_layers_on_four_thousand_ranks_take_less_than_a_minute():
    import time

    start = time.process_time()
    simulation = simulate("zipf:1.2", read_cluster("h200x8:4096"), settings=Settings(shape="kimi-k2"))
    assert simulation.shape.num_layers == 60
    assert time.process_time() - start < 60
