import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_requests import BLOCK, request

from equipoise import UserError
from equipoise.serving import POLICIES, Costs, DualMapSettings, Fault, ReplaySettings, Request, SkewedWorkload, replay
from equipoise.serving.policies import build
from equipoise.serving.simulator import Simulator, replica_name

SMALL = Costs(kv_tokens=40 * BLOCK, cache_tokens=100 * BLOCK)
SECONDS = BLOCK * SMALL.prefill_seconds  # of one block alone
CLOCK = {"router_ms"}


def unchecked(workload, expression):
    """The policies' results and the seconds of processor time, without a check of every call's types: times faster."""
    code = f"import json, time; from equipoise.serving import *; requests = list({workload}.requests()); "
    code += f"found = {expression}['policies']; print(json.dumps([found, time.process_time()]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=1800)
    return json.loads(found.stdout)


def simulate(policy, requests, replicas, faults=(), costs=SMALL, routers=1):
    names = [replica_name(number) for number in range(replicas)]
    built = [build(policy, names, costs, ReplaySettings().dual_map) for _ in range(routers)]
    return Simulator(built, requests, costs, faults).run()


def test_two_equal_requests_one_after_the_other_by_hand():
    """The second finds its 3 blocks, reads all but one token, and computes that."""
    requests = [request(0, (1, 2, 3), 0.0, 1), request(1, (1, 2, 3), 5.0, 1)]
    found = replay(requests, ["dual_map"], 1, ReplaySettings(slo=0.1, costs=SMALL))["policies"]["dual_map"]
    second = 1535 * SMALL.hit_seconds + SMALL.prefill_seconds
    assert found["ttft_percentiles"][0] == pytest.approx(second, rel=1e-5)
    assert found["ttft_percentiles"][-1] == pytest.approx(3 * SECONDS, rel=1e-5)
    assert found["hit_rate"] == found["hit_rate_bound"] == pytest.approx(1535 / 3072, rel=1e-5)
    assert (found["capacity"], found["goodput"]) == (0.5, pytest.approx(1 / 5))
    assert found["capacity_over_time"] == [0.0] + 38 * [None] + [1.0]


def test_speed_and_warm_up():
    """Twice as fast, the second request comes after 2 s instead of 4; it alone is measured."""
    requests = [request(0, (1,), 0.0, 1), request(1, (7, 8), 4.0, 1)]
    found = replay(requests, ["round_robin"], 1, ReplaySettings(speed=2.0, warmup=1, costs=SMALL))
    assert found["policies"]["round_robin"]["ttft_p50"] == pytest.approx(2 * SECONDS, rel=1e-5)
    assert found["policies"]["round_robin"]["hit_rate"] == 0.0
    assert found["settings"]["requests_per_second"] == pytest.approx(0.5)
    assert found["settings"]["speed"] == 2.0


def test_the_load_of_two_replicas_has_the_cv_of_what_waits():
    """Round robin gives one replica 3 and the other 1 block; both compute for 0.2 s or more beyond the first sample."""
    slow = replace(SMALL, prefill_seconds=2 / BLOCK)
    requests = [request(0, (1, 2, 3), 0.5, 1), request(1, (7,), 0.5, 1)]
    outcome = simulate("round_robin", requests, 2, costs=slow)
    assert outcome.load_cv == pytest.approx([0.5, 0.5, 1.0, 1.0, 1.0, 1.0])  # at 1 and 2 s, then at 3 to 6 s


def test_several_routers_take_turns():
    """Each of the two sends its first request to replica 1: 4 blocks there, from 0.5 to a little over 8.5 s."""
    slow = replace(SMALL, prefill_seconds=2 / BLOCK)
    requests = [request(0, (1, 2, 3), 0.5, 1), request(1, (7,), 0.5, 1)]
    outcome = simulate("round_robin", requests, 2, costs=slow, routers=2)
    assert outcome.served_by == ["replica-1", "replica-1"]
    assert outcome.load_cv == pytest.approx([1.0] * 8)


def test_several_routers_learn_of_each_others_load_twice_a_second():
    """The second router sends to replica 0, as the first one did; the third has heard of that at 0.5 s."""
    requests = [request(id, tuple(range(10 * id, 10 * id + 9)), at, 1) for id, at in enumerate((0.40, 0.41, 0.6))]
    assert simulate("least_loaded", requests, 3, routers=3).served_by == ["replica-0", "replica-0", "replica-1"]
    assert simulate("least_loaded", requests, 3).served_by == ["replica-0", "replica-1", "replica-2"]


def test_several_routers_of_dual_map_find_the_same_pair_without_a_word():
    """Fewer requests per router than make a key longer."""
    requests = [request(id, (1, 2, 1000 + id), 0.3 * id, 1) for id in range(50)]
    assert len(set(simulate("dual_map", requests, 7, routers=3).served_by)) == 2
    assert len(set(simulate("round_robin", requests, 7, routers=3).served_by)) == 7


def test_all_policies_see_the_same_requests_and_equal_runs_are_equal():
    requests = list(SkewedWorkload(num_requests=70, rate=20.0).requests())
    first, second = (replay(requests, replicas=3) for _ in range(2))
    assert list(first["policies"]) == list(POLICIES)
    for name, found in first["policies"].items():
        other = second["policies"][name]
        assert {key: found[key] for key in found.keys() - CLOCK} == {key: other[key] for key in other.keys() - CLOCK}
        assert 0 < found["hit_rate"] <= found["hit_rate_bound"]
        assert found["ttft_percentiles"] == sorted(found["ttft_percentiles"])
        assert found["router_ms"] > 0
    assert len({found["hit_rate_bound"] for found in first["policies"].values()}) == 1


def test_hits_and_balance_rank_as_they_should():
    """Hits rise from least_loaded over min_ttft to affinity, with dual_map near it; balance is the reverse."""
    found, _ = unchecked(
        "SkewedWorkload(num_requests=3000)", "replay(requests, settings=ReplaySettings(speed=2.0, warmup=300))"
    )
    hits = {name: policy["hit_rate"] for name, policy in found.items()}
    cvs = {name: policy["load_cv"] for name, policy in found.items()}
    assert hits["least_loaded"] < hits["min_ttft"] < hits["dual_map"] <= hits["affinity"]
    assert hits["dual_map"] > 0.9 * hits["affinity"]
    assert cvs["least_loaded"] < cvs["min_ttft"] < cvs["dual_map"] < cvs["affinity"]


def test_dual_map_is_told_the_slo_and_the_costs():
    router = build("dual_map", ["a"], Costs(prefill_seconds=1e-3), DualMapSettings(slo=2.0))
    assert router._settings.route_limit == pytest.approx(1000)
    requests = list(SkewedWorkload(num_requests=60, rate=20.0).requests())
    patient, hasty = (replay(requests, ["dual_map"], 3, ReplaySettings(slo=slo)) for slo in (1000.0, 0.1))
    assert patient["policies"]["dual_map"]["hit_rate"] > hasty["policies"]["dual_map"]["hit_rate"]


def test_what_waits_where_a_replica_dies_is_served_elsewhere():
    requests = [request(id, (10 * id, 10 * id + 1), 0.0, 50) for id in range(6)]
    outcome = simulate("dual_map", requests, 2, [Fault("die", 0, SECONDS)])
    assert set(outcome.served_by) == {"replica-1"}
    assert 0 < outcome.retried < 6


@pytest.mark.parametrize("policy", POLICIES)
def test_a_replica_that_never_answers_is_given_up_after_its_patience(policy):
    """Also where all it owes is the rest of an answer."""
    requests = [request(id, (10 * id, 10 * id + 1), 0.0, 500) for id in range(4)]
    outcome = simulate(policy, requests, 2, [Fault("hang", 0, 2.0)])
    assert set(outcome.served_by) == {"replica-1"}
    assert outcome.retried > 0
    assert max(outcome.ttft) > 60


def test_an_added_replica_takes_its_part():
    requests = [request(id, (10 * id, 10 * id + 1), id / 10, 5) for id in range(100)]
    outcome = simulate("dual_map", requests, 1, [Fault("add", 1, 5.0)])
    assert set(outcome.served_by[:40]) == {"replica-0"}
    assert 15 < outcome.served_by.count("replica-1") < 50


@pytest.mark.parametrize("policy", POLICIES)
def test_when_all_replicas_are_down_it_says_so(policy):
    requests = [request(id, (id,), float(id), 5) for id in range(9)]
    faults = [Fault("die", 0, 2.0), Fault("die", 1, 4.05)]
    with pytest.raises(UserError, match=r"All replicas are down at 4\.05 s, and 5 requests are not finished"):
        simulate(policy, requests, 2, faults)
    with pytest.raises(UserError, match="All replicas are down"):
        simulate(policy, requests, 2, [Fault("die", 0, 2.0), Fault("die", 1, 4.9)])  # nothing runs at that time


kinds = st.lists(st.tuples(st.sampled_from(["die", "hang", "add"]), st.floats(0, 30)), max_size=5)
prompts = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 99), st.floats(0, 2)), max_size=40)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(POLICIES)), prompts, kinds, st.integers(1, 3))
def test_every_request_is_served_once_whatever_happens(policy, drawn, faulty, routers):
    """The simulator itself asserts that none finishes twice; replica 2 always lives."""
    now, requests = 0.0, []
    for id, (prefix, length, answer, gap) in enumerate(drawn):
        now += gap
        blocks = (prefix, *range(1000 * (id + 1), 1000 * (id + 1) + length - 1))
        requests.append(Request(id, now, length * BLOCK - id % 7, answer, blocks))
    lost = iter((0, 1))
    added = iter(range(3, 9))
    faults = []
    for kind, at in faulty:
        number = next(added if kind == "add" else lost, None)
        if number is not None:
            faults.append(Fault(kind, number, at))
    outcome = simulate(policy, requests, 3, faults, routers=routers)
    assert all(outcome.served_by)
    for one, ttft, hit in zip(requests, outcome.ttft, outcome.hit_tokens):
        assert 0 <= hit < one.input_tokens
        assert ttft >= (one.input_tokens - hit) * SMALL.prefill_seconds * 0.999


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"requests": []}, "There are no requests"),
        ({"requests": [request(0, (1,), 2.0), request(1, (1,), 1.0)]}, r"Request 2 arrives at 1\.0 s, before"),
        ({"requests": [request(0, (1,)), request(0, (1,))]}, "same id"),
        ({"requests": [Request(0, 0.0, 0, 1, ())]}, "Request 1 has no tokens"),
        (
            {"requests": [request(0, tuple(range(41)))]},
            "Request 1 has 20999 tokens with its answer, and a replica holds",
        ),
        ({"replicas": 0}, "replicas must be at least 1, not 0"),
        ({"policies": ["nearest"]}, "no policy 'nearest'; there are dual_map, affinity"),
        ({"policies": []}, "at least one policy"),
        ({"policies": ["preble", "preble"]}, "twice"),
        ({"settings": ReplaySettings(warmup=1)}, "All 1 requests are warm-up"),
        ({"settings": ReplaySettings(faults=(Fault("die", 8, 1.0),))}, "Replica 8 cannot die at 1 s"),
        ({"settings": ReplaySettings(faults=(Fault("add", 7, 1.0),))}, "Replica 7 cannot be added"),
    ],
)
def test_bad_input_is_one_sentence(change, sentence):
    given = {"requests": [request(0, (1,))], "settings": ReplaySettings(costs=SMALL)} | change
    if "settings" in change:
        given["settings"] = replace(change["settings"], costs=SMALL)
    with pytest.raises(UserError, match=sentence):
        replay(**given)


@pytest.mark.parametrize("wrong", [{"slo": 0.0}, {"speed": 0.0}, {"speed": float("inf")}, {"warmup": -1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        ReplaySettings(**wrong)


@pytest.mark.slow
def test_a_million_requests_and_64_replicas_in_five_minutes_and_bounded_memory():
    policies, seconds = unchecked(
        "SkewedWorkload(num_requests=1_000_000, rate=60.0)", "replay(requests, ['dual_map'], 64)"
    )
    found = policies["dual_map"]
    assert seconds < 300
    assert found["entries"] <= 64 * 1_000_000 // 512 + 200 * 16 + 10_000
    assert found["router_ms"] < 0.3
