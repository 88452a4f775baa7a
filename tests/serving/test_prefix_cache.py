from hypothesis import given
from hypothesis import strategies as st

from equipoise.serving.prefix_cache import PrefixCache


def test_what_is_held_of_a_prompt_is_its_prefix():
    cache = PrefixCache(11)
    cache.use((1, 2, 3))
    assert cache.match((1, 2, 3, 4)) == 3
    assert cache.match((1, 2, 5)) == 2
    assert cache.match((2, 3)) == 2  # a caller's numbers name whole prefixes, so this does not occur
    assert cache.match((7, 1)) == 0
    assert cache.match(()) == 0


def test_the_least_recently_used_block_leaves_and_the_deepest_first():
    cache = PrefixCache(5)
    cache.use((1, 2, 3))
    cache.use((7, 8))
    cache.use((1, 2))
    cache.use((9,))  # 3 has been used least recently
    assert [cache.match((1, 2, 3)), cache.match((7, 8)), cache.match((9,))] == [2, 2, 1]
    cache.use((10,))  # then 8, before 7
    assert [cache.match((1, 2, 3)), cache.match((7, 8)), cache.match((9,))] == [2, 1, 1]


def test_of_a_prompt_longer_than_the_cache_the_beginning_is_kept():
    cache = PrefixCache(2)
    cache.use((1, 2, 3, 4, 5))
    assert (cache.match((1, 2, 3, 4, 5)), len(cache)) == (2, 2)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), max_size=40), st.integers(1, 9))
def test_held_blocks_always_form_prefixes_within_the_capacity(uses, capacity):
    """Bisection relies on this: behind a block that is not held, none is."""
    cache = PrefixCache(capacity)
    prompts = {tree: tuple(range(10 * tree, 10 * tree + 6)) for tree in range(4)}
    for tree, length in uses:
        cache.use(prompts[tree][:length])
        held = {tree: [block in cache._held for block in prompt] for tree, prompt in prompts.items()}
        for tree, flags in held.items():
            assert flags == sorted(flags, reverse=True)
            assert cache.match(prompts[tree]) == sum(flags)
        assert len(cache) <= capacity
