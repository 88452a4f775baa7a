"""Foldings: groups partition the ranks, stages agree, volumes are those of counted copies."""

import itertools

import numpy as np
import pytest

from equipoise.errors import UserError
from equipoise.parallel import Folding, dispatch_bytes, foldings
from equipoise.parallel.mesh import ATTENTION, EXPERTS


def check(folding):
    """Every axis cuts the ranks into groups of its size; two axes of a side meet in one rank at most."""
    for side in (ATTENTION, EXPERTS):
        assert np.prod([getattr(folding, axis) for axis in side]) == folding.num_ranks
        for axis in side:
            groups = folding.groups(axis)
            assert groups.shape[1] == getattr(folding, axis)
            assert (np.sort(groups, axis=None) == np.arange(folding.num_ranks)).all()
    size = folding.num_ranks // folding.pp
    stages = np.arange(folding.num_ranks).reshape(folding.pp, size)  # pipeline slowest: a stage is a block of ranks
    assert (np.sort(folding.groups("tp", "cp", "dp"), axis=1) == stages).all()
    assert (np.sort(folding.groups("etp", "ep", "edp"), axis=1) == stages).all()
    assert (folding.groups("pp") == stages.T).all()


def test_a_folding_drawn_by_hand():
    # Eight ranks, two stages. Attention: tp 2, dp 2. Experts: ep 4.
    folding = Folding(num_ranks=8, tp=2, pp=2, ep=4)
    assert (folding.dp, folding.edp) == (2, 1)
    assert folding.groups("tp").tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert folding.groups("dp").tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert folding.groups("ep").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert folding.groups("pp").tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert folding.coordinates(6) == {"tp": 0, "cp": 0, "dp": 1, "pp": 1, "etp": 0, "ep": 2, "edp": 0}


def test_several_axes_make_one_group_with_the_first_fastest():
    folding = Folding(num_ranks=8, etp=2, ep=2)
    assert folding.groups("etp", "ep").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert folding.groups("ep", "etp").tolist() == [[0, 2, 1, 3], [4, 6, 5, 7]]
    assert folding.groups("ep", "edp").tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 12, 30, 32])
def test_every_legal_folding(num_ranks):
    found = list(foldings(num_ranks))
    assert len(set(found)) == len(found)
    for folding in found:
        check(folding)


def test_the_number_of_foldings():
    # One prime factor: it goes to the pipeline (1 way), or to one of three axes on each side (3 * 3 ways).
    assert len(list(foldings(2))) == 10
    assert len(list(foldings(1))) == 1


def test_a_sample_of_the_foldings_of_4096_ranks():
    found = list(foldings(4096))
    # Over the 13 pipeline sizes: for 2^j ranks per stage, the ways to write j as three summands, squared.
    assert len(found) == sum(((j + 2) * (j + 1) // 2) ** 2 for j in range(13))
    for folding in found[::997]:
        check(folding)


@pytest.mark.slow
def test_all_foldings_of_4096_ranks():
    for folding in foldings(4096):
        check(folding)


def test_coordinates_are_a_bijection_that_agrees_with_the_groups():
    folding = Folding(num_ranks=24, tp=2, cp=3, pp=2, etp=1, ep=6)
    for side in (ATTENTION, EXPERTS):
        assert len({tuple(folding.coordinates(rank)[axis] for axis in side) for rank in range(24)}) == 24
        for axis in side:
            for group in folding.groups(axis).tolist():
                places = [folding.coordinates(rank) for rank in group]
                assert [place[axis] for place in places] == list(range(getattr(folding, axis)))
                assert len({tuple(place[other] for other in side if other != axis) for place in places}) == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_ranks": 8, "tp": 3}, r"8 ranks do not divide by tp \* cp \* pp = 3"),
        ({"num_ranks": 8, "ep": 16}, r"8 ranks do not divide by etp \* ep \* pp = 16"),
        ({"num_ranks": 8, "cp": 0}, "at least 1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        Folding(**sizes)


def test_axes_and_ranks_that_do_not_exist_are_refused():
    folding = Folding(num_ranks=4, tp=2)
    for axes in (("tp", "ep"), ("xp",), (), ("tp", "tp")):
        with pytest.raises(UserError, match="Groups run along"):
            folding.groups(*axes)
    with pytest.raises(UserError, match="Rank 4"):
        folding.coordinates(4)


@pytest.mark.parametrize(("ep", "etp", "k"), [(1, 1, 2), (4, 1, 3), (2, 2, 1), (3, 2, 2)])
def test_volumes_are_those_of_copies_counted_over_all_choices(ep, etp, k):
    """A token on (ep 0, etp 0); its k choices run over all ep positions; every copy elsewhere is a row that travels."""
    folding = Folding(num_ranks=ep * etp, ep=ep, etp=etp)
    choices = list(itertools.product(range(ep), repeat=k))
    per_choice = sum((place, shard) != (0, 0) for picks in choices for place in picks for shard in range(etp))
    per_rank = sum((place, shard) != (0, 0) for picks in choices for place in set(picks) for shard in range(etp))
    row = 2 * 5 * 7 * 2  # both ways, five tokens of width 7 in bf16
    assert dispatch_bytes(folding, "alltoall", 5, k, 7) == pytest.approx(row * per_choice / len(choices))
    assert dispatch_bytes(folding, "flex", 5, k, 7) == pytest.approx(row * per_rank / len(choices))
    assert dispatch_bytes(folding, "allgather", 5, k, 7) == row * (ep * etp - 1)


def test_unknown_dispatchers_are_refused():
    with pytest.raises(UserError, match="at least 1"):
        dispatch_bytes(Folding(num_ranks=2, ep=2), "flex", 0, 1, 8)
