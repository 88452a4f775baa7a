import subprocess
import sys
from collections import Counter

import pytest

from equipoise.serving.rings import Pairs

KEYS = range(4000)


def names(count):
    return [f"replica-{number}" for number in range(count)]


def test_a_pair_is_two_different_replicas_and_the_same_for_every_router():
    forwards, backwards = Pairs(names(7)), Pairs(reversed(names(7)))
    for key in KEYS:
        first, second = forwards.of(key)
        assert first != second
        assert backwards.of(key) == (first, second)


def test_another_process_finds_the_same_pairs():
    code = "from equipoise.serving.rings import Pairs; print([Pairs('abc').of(key) for key in range(5)])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == str([Pairs("abc").of(key) for key in range(5)])


def test_one_replica_is_both_of_its_pair():
    assert Pairs(["only"]).of(3) == ("only", "only")


def test_the_rings_are_independent_and_their_shares_even():
    pairs = Pairs(names(8))
    counts = Counter(pairs.of(key) for key in KEYS)
    assert len(counts) == 8 * 7  # every ordered pair
    firsts = Counter(first for first, _ in counts.elements())
    assert max(firsts.values()) < 1.2 * len(KEYS) / 8


@pytest.mark.parametrize("count", [2, 3, 8, 31, 64])
def test_adding_a_replica_changes_at_most_two_of_n_pairs_and_all_of_them_concern_it_or_its_neighbour(count):
    pairs = Pairs(names(count))
    before = {key: pairs.of(key) for key in KEYS}
    pairs.add("replica-new")
    changed = [key for key in KEYS if pairs.of(key) != before[key]]
    assert 0 < len(changed) <= 2 / count * len(KEYS)
    for key in changed:
        assert "replica-new" in pairs.of(key)


def test_removing_a_replica_is_adding_it_backwards():
    pairs, smaller = Pairs(names(5)), Pairs([name for name in names(5) if name != "replica-3"])
    pairs.remove("replica-3")
    assert [pairs.of(key) for key in KEYS] == [smaller.of(key) for key in KEYS]
    assert pairs.after("replica-2") == "replica-4"
    assert pairs.after("replica-4") == "replica-0"
