"""Owners over all layers: unique, equally many per rank, light experts balanced."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_loads import skewed

from equipoise.errors import UserError
from equipoise.parallel import heterogeneous_owners


def test_an_example_worked_by_hand():
    # Two ranks, one heavy expert per layer; light ones: layer 0 has 5, 4, 3, layer 1 has 9, 1, 1. Four slots per rank.
    load_LE = np.array([[5, 100, 4, 3], [9, 1, 1, 50]])
    owner_LE = heterogeneous_owners(load_LE, num_ranks=2, overlap=1)
    # Layer 1 first (9 is heavier than 5): 9 to rank 0, 1 and 1 to rank 1. Then layer 0: 5 to the rank with fewer free
    # slots, rank 1; 4 to rank 0, 3 to rank 0. Rank 1 has one slot left, rank 0 one.
    assert owner_LE.tolist() == [[1, 0, 0, 0], [0, 1, 1, 1]]


def test_nodes_are_balanced_before_their_ranks():
    # Nodes {0, 1} and {2, 3}, a slot per rank: 9 to node 0, 5 and 4 to node 1, and 1 to the last slot.
    owner_LE = heterogeneous_owners(np.array([[9, 5, 4, 1]]), num_ranks=4, overlap=0, ranks_per_node=2)
    assert owner_LE.tolist() == [[0, 2, 3, 1]]


@settings(max_examples=70, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 13), st.integers(0, 4), st.integers(1, 4))
def test_ranks_own_equally_many_experts_over_all_layers(num_ranks, num_layers, num_experts, overlap, ranks_per_node):
    load_LE = skewed(num_layers, num_experts, rows=1009)
    owner_LE = heterogeneous_owners(load_LE, num_ranks, overlap, ranks_per_node)
    counts = np.bincount(owner_LE.ravel(), minlength=num_ranks)
    assert len(counts) == num_ranks
    assert counts.max() - counts.min() <= 1


def test_light_experts_are_more_even_than_in_equal_blocks():
    load_LE = skewed(num_ranks=6, num_experts=64, rows=100_000)
    owner_LE = heterogeneous_owners(load_LE, num_ranks=8, overlap=8)
    blocks_LE = np.tile(np.arange(64) // 8, (6, 1))

    def imbalance(owner_LE):
        light_LE = np.where(load_LE.argsort(1).argsort(1) < 56, load_LE, 0)
        load_LR = np.stack([np.bincount(owner, light, 8) for owner, light in zip(owner_LE, light_LE)])
        return (load_LR.max(1) / load_LR.mean(1)).mean()

    assert imbalance(blocks_LE) > 1.5
    assert imbalance(owner_LE) < 1.15


@pytest.mark.parametrize(
    ("load_LE", "ranks", "overlap"), [(np.array([[-1]]), 1, 0), (np.array([[1]]), 0, 0), (np.array([[1]]), 1, -1)]
)
def test_input_without_sense_is_refused(load_LE, ranks, overlap):
    with pytest.raises(UserError, match="must"):
        heterogeneous_owners(load_LE, ranks, overlap)
