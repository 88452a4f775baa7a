"""A layer's phases against sums done by hand."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_machine import FAR, IDEAL, NEAR, SHAPE, tiny

from equipoise.parallel import LeastLoaded, Native, Plan, Segment, Transfer, contiguous_owners
from equipoise.simulator import Policy
from equipoise.simulator.cost import CostModel
from equipoise.simulator.network import Network

# Four ranks, one expert each: every rank sends 3 rows to rank 0 and keeps or sends one to rank 1.
LOAD = np.array([[3, 1, 0, 0]] * 4)
OWNER = contiguous_owners(4, 4)
EXPERT = SHAPE.expert_bytes  # 18


class Given:
    """Returns the same plan always; decides ahead if it has a window."""

    def __init__(self, plan, window=0):
        self.made, self.window = plan, window

    def plan(self, load_RE, owner_E, history_WE=None):
        return self.made


def model(software=IDEAL, shape=SHAPE, training=False, **others):
    cluster = tiny(software=software, **others)
    return CostModel(cluster, Network(cluster, 4), shape, 4, training)


def phases(cost):
    return [(phase.name, phase.backward, phase.seconds_R.tolist()) for phase in cost.phases]


def native(model):
    return model.layer(Policy(planner=Native()), Native().plan(LOAD, OWNER), LOAD)


def spilled(rematerialise=False):
    """Half of expert 0 (the rows of ranks 2 and 3) on rank 2, to which its weights travel."""
    return Plan(
        4,
        [[Segment(0, 0, 6), Segment(2, 6, 12)], [Segment(1, 0, 4)], [], []],
        [[0], [1], [2], [3]],
        [Transfer(0, 0, 2)],
        [0, 0, 0, 0],
        rematerialise,
    )


def test_forward_of_plain_expert_parallelism():
    cost = native(model())
    # A row is 2 bytes. Rank 0 gets 3 rows from its neighbour and 6 from the other node, which takes longer; rank 1 gets
    # 1 and 2; the others send 4 each.
    assert phases(cost) == [
        ("attention", False, [0, 0, 0, 0]),
        ("weights", False, [0, 0, 0, 0]),
        ("dispatch", False, pytest.approx([12 / FAR, 4 / FAR, 8 / FAR, 8 / FAR])),
        ("experts", False, pytest.approx([12, 4, 0, 0])),  # a row takes a second
        ("combine", False, pytest.approx([12 / FAR, 4 / FAR, 8 / FAR, 8 / FAR])),
    ]
    assert cost.seconds == pytest.approx(12 + 2 * 12 / FAR)
    assert cost.load_R.tolist() == [12, 4, 0, 0]
    np.testing.assert_allclose(cost.bytes_KL, [[2 * 2 * 4, 2 * 2 * 8], [0, 0], [0, 0]])


def test_training_doubles_the_multiplications_and_returns_the_rows_gradients():
    cost = native(model(training=True))
    backward = [phase for phase in cost.phases if phase.backward]
    assert [phase.name for phase in backward] == [
        "weights",
        "dispatch",
        "experts",
        "combine",
        "gradients",
        "attention",
    ]
    assert cost.seconds == pytest.approx(3 * 12 + 4 * 12 / FAR)
    assert cost.backward_seconds == pytest.approx(2 * 12 + 2 * 12 / FAR)


def test_weights_of_a_planner_that_waits_for_the_router_share_the_links_with_the_rows():
    cost = model().layer(Policy(planner=Given(None)), spilled(), LOAD)
    weights, dispatch = (cost.phases[place].seconds_R for place in (1, 2))
    # Rank 0 sends 1 row near and 18 bytes of weights far; it receives 3 rows near and none far. Rank 2 sends 1 row far.
    assert dispatch.tolist() == pytest.approx([6 / NEAR, 4 / FAR, 2 / FAR, 2 / FAR])
    assert (weights + dispatch).tolist() == pytest.approx([EXPERT / FAR, 4 / FAR, EXPERT / FAR, 2 / FAR])
    assert cost.phases[3].seconds_R.tolist() == [6, 4, 6, 0]
    np.testing.assert_allclose(cost.bytes_KL[1], [0, EXPERT])
    assert (cost.transfers, cost.received_R.tolist()) == (1, [0, 0, 1, 0])


def test_planning_and_a_slower_way_of_weights_count():
    slower = replace(IDEAL, weight_efficiency=0.5, plan_seconds=0.25)
    cost = model(slower).layer(Policy(planner=Given(None)), spilled(), LOAD)
    assert (cost.phases[1].seconds_R + cost.phases[2].seconds_R)[0] == pytest.approx(2 * EXPERT / FAR + 0.25)


def test_attention_hides_the_weights_of_a_planner_that_decides_ahead():
    # Attention: 2 flops * 9 parameters * 4 tokens / 36 flops per second = 2 s; the weights take 1.8 s.
    hiding = model(shape=replace(SHAPE, other_params=9.0), training=True)
    ahead = Policy(planner=Given(None, window=1))
    cost = hiding.layer(ahead, spilled(), LOAD)
    assert cost.phases[0].seconds_R.tolist() == [2, 2, 2, 2]
    assert not cost.phases[1].seconds_R.any()
    short = model(shape=replace(SHAPE, other_params=4.5), training=True)
    cost = short.layer(ahead, spilled(), LOAD)
    assert cost.phases[1].seconds_R.tolist() == pytest.approx([0.8, 0, 0.8, 0])  # 1.8 s less one
    named = {phase.name: phase.seconds_R for phase in cost.phases if phase.backward}
    assert not named["gradients"].any()  # two seconds of attention hide 1.8
    again = {phase.name: phase.seconds_R for phase in short.layer(ahead, spilled(True), LOAD).phases if phase.backward}
    np.testing.assert_allclose(short.layer(ahead, spilled(True), LOAD).bytes_KL[1], [0, 2 * EXPERT])
    # Rank 0 sends the weights again while it receives their gradient: both ways at once, so nothing is added.
    assert not again["gradients"].any()


def test_gradients_take_the_weights_way_back():
    cost = model(training=True).layer(Policy(planner=Given(None)), spilled(), LOAD)
    named = {phase.name: phase.seconds_R for phase in cost.phases if phase.backward}
    combine, gradients = named["combine"], named["gradients"]
    assert (combine + gradients)[[0, 2]].tolist() == pytest.approx([EXPERT / FAR, EXPERT / FAR])
    np.testing.assert_allclose(cost.bytes_KL[2], [0, EXPERT])


def test_weights_that_were_freed_are_sent_again():
    training = model(training=True)
    freed = training.layer(Policy(planner=Given(None)), spilled(rematerialise=True), LOAD)
    kept = training.layer(Policy(planner=Given(None)), spilled(), LOAD)
    assert freed.phases[5].backward
    assert freed.phases[5].seconds_R.tolist() == freed.phases[1].seconds_R.tolist()
    assert freed.seconds - kept.seconds == pytest.approx(freed.phases[1].seconds_R.max())
    np.testing.assert_allclose(freed.bytes_KL[1], 2 * kept.bytes_KL[1])
    forward = model().layer(Policy(planner=Given(None)), spilled(rematerialise=True), LOAD)
    np.testing.assert_allclose(forward.bytes_KL[1], [0, EXPERT])


def test_replicas_between_steps_cost_only_training():
    plan = Plan(4, [[Segment(0, 0, 12)], [Segment(1, 0, 4)], [], []], [[0, 2], [1], [2], [3]], [], [0, 0, 0, 0])
    policy = Policy(planner=Given(None, window=1))
    assert model().layer(policy, plan, LOAD).bytes_KL[2].sum() == 0
    cost = model(training=True).layer(policy, plan, LOAD)
    np.testing.assert_allclose(cost.bytes_KL[2], [0, 2 * EXPERT])  # the gradient there, the weights back
    named = {phase.name: phase.seconds_R for phase in cost.phases if phase.backward}
    assert named["gradients"].tolist() == pytest.approx([EXPERT / FAR, 0, EXPERT / FAR, 0])


def test_small_multiplications_are_slow_and_reading_weights_takes_its_time():
    software = replace(IDEAL, half_rows=2.0, launch_seconds=0.125)
    assert native(model(software)).phases[3].seconds_R.tolist() == [14.125, 6.125, 0, 0]
    starved = model(software, training=True)
    starved = replace(starved, cluster=replace(starved.cluster, memory_bandwidth=EXPERT / 10.0))
    cost = native(starved)
    assert cost.phases[3].seconds_R.tolist() == pytest.approx([14.125, 10.125, 0, 0])
    # The backward pass multiplies twice, and reads the weights for one of them, writes their gradient after the other.
    assert cost.phases[7].seconds_R.tolist() == pytest.approx([28.125, 20.125, 0, 0])


def test_rows_cross_the_memory_where_they_start_and_where_they_are_computed():
    passing = model(replace(IDEAL, row_passes=3.0))
    passing = replace(passing, cluster=replace(passing.cluster, memory_bandwidth=24.0))  # 3 * 2 / 24: 0.25 s per row
    cost = native(passing)
    assert cost.phases[3].seconds_R.tolist() == pytest.approx([12 * 1.25, 4 * 1.25, 0, 0])
    # Four rows at each source, half of the passes before and half after.
    assert cost.phases[2].seconds_R.tolist() == pytest.approx([1.2 + 0.5, 0.4 + 0.5, 0.8 + 0.5, 0.8 + 0.5])
    twice = native(replace(passing, shape=replace(SHAPE, top_k=2)))  # each token has two rows
    assert twice.phases[2].seconds_R.tolist() == pytest.approx([1.2 + 1, 0.4 + 1, 0.8 + 1, 0.8 + 1])


def test_dropped_rows_cost_nothing_and_are_counted():
    plan = LeastLoaded(min_rows=1, threshold=1.0, max_rows=3).plan(LOAD, OWNER)
    cost = model().layer(Policy(planner=Given(None)), plan, LOAD)
    assert cost.dropped == 4
    assert cost.phases[3].seconds_R.tolist() == [3, 3, 3, 3]
