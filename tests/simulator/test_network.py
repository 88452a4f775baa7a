"""Traffic against the plan's own arithmetic, and times against sums done by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_machine import FAR, IDEAL, NEAR, tiny

from equipoise.parallel import LeastLoaded, Native, Plan, Replicas, Shadow, ShardedSparse, Transfer, contiguous_owners
from equipoise.simulator.network import Network, resident_traffic, row_traffic, weight_traffic

PLANNERS = {
    "native": Native(),
    "least-loaded": LeastLoaded(min_rows=1, threshold=1.0),
    "dropping": LeastLoaded(min_rows=2, max_rows=7),
    "sharded-sparse": ShardedSparse(overlap=3, slots=2, ranks_per_node=2),
    "replicas": Replicas(num_slots=15),
    "shadow": Shadow(dim=64, hidden_dim=2, bandwidth=1e3),
}


@pytest.mark.parametrize("name", PLANNERS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), busy=st.booleans())
def test_row_traffic_is_the_plans_own(name, seed, busy):
    draw = np.random.default_rng(seed)
    load_RE = draw.integers(0, 9, (5, 7)) * draw.integers(0, 2, (5, 7)) * busy
    plan = PLANNERS[name].plan(load_RE, contiguous_owners(7, 5))
    np.testing.assert_array_equal(row_traffic(plan, load_RE), plan.traffic_RR(load_RE))


def test_a_message_takes_the_nearest_link_that_joins_both_ranks():
    network = Network(tiny(), 4)
    traffic_RR = np.zeros((4, 4))
    traffic_RR[0] = [1000, 50, 0, 0]
    np.testing.assert_allclose(network.seconds_R(traffic_RR), [50 / NEAR, 50 / NEAR, 0, 0])
    traffic_RR[0] = [1000, 50, 30, 20]
    # Both links at once: 50 bytes near, 50 far; what a rank keeps costs nothing.
    np.testing.assert_allclose(network.seconds_R(traffic_RR), [50 / FAR, 50 / NEAR, 30 / FAR, 20 / FAR])
    np.testing.assert_allclose(network.bytes_L(traffic_RR), [50, 50])


def test_a_port_sends_and_receives_at_the_same_time():
    traffic_RR = np.array([[0, 0, 40.0, 0], [0, 0, 0, 0], [70.0, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(Network(tiny(), 4).seconds_R(traffic_RR), [7, 0, 7, 0])


def test_ranks_that_share_a_port_add_up():
    traffic_RR = np.zeros((4, 4))
    traffic_RR[0, 2], traffic_RR[1, 3] = 40, 20
    np.testing.assert_allclose(Network(tiny(ranks_per_port=2), 4).seconds_R(traffic_RR), [6, 6, 6, 6])


def test_hops_messages_and_efficiency_count():
    software = replace(IDEAL, link_efficiency=0.5, hop_seconds=0.25, message_seconds=0.125)
    cluster = tiny(software=software)
    cluster = replace(cluster, links=(cluster.links[0], replace(cluster.links[1], hops=3)))
    traffic_RR = np.zeros((4, 4))
    traffic_RR[0, 2], traffic_RR[0, 3] = 10, 10
    network = Network(cluster, 4)
    np.testing.assert_allclose(network.seconds_R(traffic_RR)[0], 20 / (FAR * 0.5) + 3 * 0.25 + 2 * 0.125)
    np.testing.assert_allclose(network.seconds_R(traffic_RR, 0.25)[0], 20 / (FAR * 0.25) + 3 * 0.25 + 2 * 0.125)
    assert not network.seconds_R(np.zeros((4, 4))).any()


def test_a_third_link_carries_only_what_goes_that_far():
    cluster = tiny(8)
    near, far = cluster.links
    cluster = replace(cluster, links=(near, replace(far, reach=4), replace(far, name="spine", bandwidth=5.0)))
    traffic_RR = np.zeros((8, 8))
    traffic_RR[0, 1], traffic_RR[0, 2], traffic_RR[0, 4] = 1, 2, 4
    network = Network(cluster, 8)
    np.testing.assert_allclose(network.bytes_L(traffic_RR), [1, 6, 4])
    assert network.seconds_R(traffic_RR)[0] == pytest.approx(max(1 / NEAR, 6 / FAR, 4 / 5))


def test_weights_from_the_owner_or_from_rank_to_rank():
    transfers = [Transfer(0, 1, 0), Transfer(0, 1, 2), Transfer(0, 1, 3), Transfer(2, 2, 0)]
    plan = Plan(4, [[], [], []], [[1], [1], [2]], transfers, [0, 0, 0])
    assert weight_traffic(plan, broadcast=False).tolist() == [[0, 0, 0, 0], [1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    # On from rank 1 to 2, 3 and round to 0; expert 2 from rank 2 to 0.
    assert weight_traffic(plan, broadcast=True).tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1], [1, 0, 0, 0]]
    assert weight_traffic(replace(plan, transfers=[]), broadcast=True).sum() == 0


def test_replicas_gradients_go_down_the_chain():
    plan = Plan(4, [[], []], [[0, 2, 3], [1]], [], [0, 0])
    assert resident_traffic(plan).tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]
