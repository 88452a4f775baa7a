"""What holds for every planner: valid plans, the same on every rank, from loads alone."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from made_up_loads import loads, skewed

from equipoise.parallel import (
    Calibration,
    LeastLoaded,
    Native,
    Replicas,
    Shadow,
    ShardedSparse,
    contiguous_owners,
)

SLOW_NETWORK = {"dim": 8, "hidden_dim": 16, "bandwidth": 1e3, "flops": 1e6}
PLANNERS = {
    "native": lambda ranks, experts, node: Native(),
    "least_loaded": lambda ranks, experts, node: LeastLoaded(min_rows=1),
    "least_loaded, always": lambda ranks, experts, node: LeastLoaded(min_rows=7, threshold=0.0, alpha=1.1),
    "least_loaded, overflow at home": lambda ranks, experts, node: LeastLoaded(min_rows=7, overflow="native"),
    "least_loaded, overflow spread": lambda ranks, experts, node: LeastLoaded(min_rows=7, overflow="spread"),
    "least_loaded, two levels": lambda ranks, experts, node: LeastLoaded(min_rows=(3, 29), ranks_per_node=node),
    "least_loaded, little memory": lambda ranks, experts, node: LeastLoaded(min_rows=5, max_rows=61, max_foreign=1),
    "sharded_sparse": lambda ranks, experts, node: ShardedSparse(overlap=3, slots=2, ranks_per_node=node),
    "sharded_sparse, calibrated": lambda ranks, experts, node: ShardedSparse(
        overlap=1,
        slots=1,
        ranks_per_node=node,
        calibration=Calibration(slots=2, row_seconds=1.0, expert_seconds=3.0),
        rematerialise=True,
    ),
    "replicas": lambda ranks, experts, node: Replicas(num_slots=(experts // ranks + 2) * ranks),
    "replicas, nearest": lambda ranks, experts, node: Replicas(num_slots=(experts // ranks + 2) * ranks, nearest=True),
    "replicas, sent": lambda ranks, experts, node: Replicas(num_slots=(experts // ranks + 3) * ranks, resident=False),
    "shadow": lambda ranks, experts, node: Shadow(**SLOW_NETWORK),
}


@pytest.mark.parametrize("name", PLANNERS)
@settings(max_examples=100, deadline=None)
@given(loads())
def test_every_plan_is_valid_and_depends_on_the_loads_alone(name, case):
    load_RE, owner_E, ranks_per_node = case
    planner = PLANNERS[name](*load_RE.shape, ranks_per_node)
    plan = planner.plan(load_RE, owner_E)
    plan.check(load_RE)
    assert plan.load_R().sum() + sum(plan.dropped) == load_RE.sum()
    assert planner.plan(load_RE.astype(np.int32), owner_E.astype(np.int32)) == plan
    if planner.window:
        other_load_RE = np.flip(load_RE, 0) + 1
        planner.plan(other_load_RE, owner_E, load_RE.sum(0)[None]).check(other_load_RE)


@pytest.mark.parametrize("name", PLANNERS)
def test_only_the_memory_cap_drops_rows(name):
    load_RE = skewed(num_ranks=5, num_experts=11)
    plan = PLANNERS[name](5, 11, 2).plan(load_RE, contiguous_owners(11, 5))
    assert (sum(plan.dropped) > 0) == (name == "least_loaded, little memory")


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize(("num_ranks", "num_experts"), [(1, 1), (1, 5), (5, 5), (7, 3), (3, 7)])
def test_one_expert_per_rank_and_counts_that_do_not_divide(name, num_ranks, num_experts):
    planner = PLANNERS[name](num_ranks, num_experts, 1)
    owner_E = contiguous_owners(num_experts, num_ranks)
    every_expert_per_token = np.full((num_ranks, num_experts), 13)  # K = E
    for load_RE in (every_expert_per_token, skewed(num_ranks, num_experts, rows=97)):
        planner.plan(load_RE, owner_E).check(load_RE)


@pytest.mark.parametrize("name", ["native", "least_loaded", "least_loaded, two levels", "replicas", "shadow"])
def test_with_even_loads_no_planner_makes_it_worse(name):
    load_RE = np.full((4, 8), 31)
    assert PLANNERS[name](4, 8, 2).plan(load_RE, contiguous_owners(8, 4)).imbalance() == 1.0


def test_native_is_the_owners_own_work():
    load_RE = np.array([[3, 0, 1], [2, 0, 4]])
    plan = Native().plan(load_RE, np.array([1, 0, 1]))
    assert plan.segments == [[(1, 0, 5)], [], [(1, 0, 5)]]
    assert plan.resident == [[1], [0], [1]]
    assert plan.transfers == []
    assert plan.load_R().tolist() == [0, 10]
    assert plan.imbalance() == 2.0


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from made_up_loads import skewed
from equipoise.parallel import *
load_RE, owner_E = skewed(7, 19), contiguous_owners(19, 7)
planners = [LeastLoaded(min_rows=5), ShardedSparse(overlap=5, slots=2, ranks_per_node=3), Replicas(num_slots=28),
            Shadow(dim=8, hidden_dim=16, bandwidth=1e3, flops=1e6)]
for planner in planners:
    print(planner.plan(load_RE, owner_E))
assert "torch" not in sys.modules
"""


def test_processes_agree_whatever_their_hash_seed_and_need_no_torch():
    folder = os.path.dirname(__file__)
    printed = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM, folder],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1
    assert "Transfer" in printed.pop()
