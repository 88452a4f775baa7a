import random
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from engine_runs import TINY, Watch, answer, expect, random_prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.serving.engine import BlockCache, Engine, block_names, build_model


@pytest.fixture
def engine():
    with closing(Engine(TINY)) as engine:
        yield engine


@pytest.mark.parametrize("length", [1, 6, 7, 8, 11, 13, 14, 15, 22, 29, 53, 77, 101])
def test_answers_equal_full_recomputation_and_cached_tokens_are_not_computed(engine, length):
    watch, prompt = Watch(engine), random_prompt(length)
    first, cached = answer(engine, prompt, 5)
    assert (first, cached) == (expect(prompt, 5), 0)
    assert sum(watch.computed) == length + 4  # the last token of an answer is not computed
    assert max(watch.computed) <= TINY.chunk_tokens
    watch.computed.clear()
    second, cached = answer(engine, prompt, 5)
    assert (second, cached) == (first, (length - 1) // 7 * 7)
    assert sum(watch.computed) == length - cached + 4


def test_the_first_block_decides_the_answer(engine):
    """Otherwise the equalities here would hold with wrong keys and values as well."""
    prompts = [random_prompt(7, seed) + random_prompt(46) for seed in range(5)]
    answers = [answer(engine, prompt, 5)[0] for prompt in prompts]
    assert answers == [expect(prompt, 5) for prompt in prompts]
    assert len({tuple(ids) for ids in answers}) == 5


def test_the_next_turn_and_a_branch_find_what_they_share(engine):
    first_turn = random_prompt(24)
    first_answer, _ = answer(engine, first_turn, 13)
    second_turn = first_turn + first_answer + random_prompt(10)
    assert answer(engine, second_turn, 5) == (expect(second_turn, 5), 21)
    third_turn = second_turn + random_prompt(3)
    assert answer(engine, third_turn, 5) == (expect(third_turn, 5), 42)  # of 47, with the first answer
    branch = second_turn[:30] + random_prompt(12)
    assert answer(engine, branch, 5) == (expect(branch, 5), 28)


def test_a_block_behind_other_blocks_is_another_block(engine):
    block = random_prompt(7)
    answer(engine, [*random_prompt(7, seed=1), *block, 65], 1)
    assert answer(engine, [*block, 65], 3) == (expect([*block, 65], 3), 0)
    assert answer(engine, [*block, *block, 65], 3) == (expect([*block, *block, 65], 3), 7)


def test_many_prompts_get_equal_answers_with_and_without_cache(engine):
    """Two replicas, in single precision: different chunks, blocks and evictions round differently."""
    choose = random.Random(3)
    stems = [random_prompt(60, seed) for seed in range(5)]
    prompts = [choose.choice(stems)[: choose.randint(1, 60)] + random_prompt(choose.randint(1, 20)) for _ in range(60)]
    with (
        closing(Engine(replace(TINY, cache_tokens=140))) as small,
        closing(Engine(replace(TINY, cache_tokens=0))) as none,
    ):
        cached = 0
        for prompt in prompts:
            expected, nothing = answer(none, prompt, 7)
            assert nothing == 0
            assert answer(engine, prompt, 7)[0] == expected
            ids, tokens = answer(small, prompt, 7)
            assert ids == expected
            cached += tokens
    assert cached > 500


def test_replicas_have_equal_weights_and_leave_the_global_seed_alone():
    before = torch.get_rng_state()
    first, second, other = build_model(TINY), build_model(TINY), build_model(replace(TINY, seed=6))
    assert torch.equal(torch.get_rng_state(), before)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_the_cache_stays_within_its_bound_and_the_deepest_block_leaves_first():
    with closing(Engine(replace(TINY, cache_tokens=5 * 7 + 6))) as engine:
        p, q, r = random_prompt(22), random_prompt(15), random_prompt(8)
        for prompt in (p, q, p[:15], r):  # the last leaves room for five blocks only without the third of p
            answer(engine, prompt, 1)
        assert [answer(engine, prompt, 1)[1] for prompt in (p[:15], q, r)] == [14, 14, 7]
        assert answer(engine, p, 1)[1] == 14  # its third block is back, for the second of q
        assert [answer(engine, prompt, 1)[1] for prompt in (r, q)] == [7, 7]
        answer(engine, random_prompt(150), 1)
        assert answer(engine, random_prompt(150), 1)[1] == 35  # the beginning of a prompt longer than the cache


def names_of(tree: int, length: int) -> list[bytes]:
    return [bytes([tree, depth]) for depth in range(length)]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), max_size=30), st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_held_blocks_always_form_beginnings_within_the_capacity(uses, capacity):
    cache = BlockCache(capacity)
    for tree, length in uses:
        names = names_of(tree, length)
        cache.keep(names, [torch.tensor(list(name)) for name in names])
        found = {tree: cache.match(names_of(tree, 6)) for tree in range(4)}
        assert sum(map(len, found.values())) == len(cache._held) <= capacity  # no block behind a gap
        assert len(found[tree]) >= min(length, capacity)
        for tree, blocks in found.items():
            assert [block.tolist() for block in blocks] == [[tree, depth] for depth in range(len(blocks))]


def test_a_block_name_stands_for_all_tokens_up_to_its_end():
    names = block_names(bytes(random_prompt(22)), 7)
    assert [len(names), len(set(names))] == [3, 3]
    assert block_names(bytes(random_prompt(22)[:14]), 7) == names[:2]
    changed = block_names(bytes([random_prompt(22)[0] ^ 1, *random_prompt(22)[1:]]), 7)
    assert set(changed).isdisjoint(names)
