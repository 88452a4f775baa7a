from equipoise.serving.hotness import KeyLength

HOT = tuple(range(11))  # a shared prefix
N = 8


def fill(length, prompts):
    for prompt in prompts:
        length.observe(prompt)


def others(count, start=1000):
    """Prompts that share nothing."""
    return [(start + place, 500_000 + place) for place in range(count)]


def test_a_key_starts_at_one_block():
    assert KeyLength().depth(HOT, N) == 1


def test_it_grows_while_more_than_two_of_n_requests_share_it():
    """Of 100: all share block 0, 60 share block 1, 26 share block 2, 25 share block 3; the bound is 25."""
    length = KeyLength(window=100)
    fill(length, [(0, 900)] * 40 + [(0, 1, 901)] * 34 + [(0, 1, 2, 902)] * 1 + [(0, 1, 2, 3, 4)] * 25)
    assert length.depth((0, 1, 2, 3, 4), N) == 4
    assert length.depth((0, 900), N) == 2  # a prompt cannot be keyed beyond its end
    assert length.depth((0, 1, 901), N) == 3
    assert length.depth((55, 56), N) == 1


def test_it_waits_for_enough_requests():
    length = KeyLength(least=20)
    fill(length, [HOT] * 19)
    assert length.depth(HOT, N) == 1
    length.observe(HOT)
    assert length.depth(HOT, N) == 11


def test_hot_then_cold_returns_to_depth_1():
    length = KeyLength(window=100)
    fill(length, [HOT[:5]] * 100)
    assert length.depth((*HOT[:5], 77), N) == 6
    fill(length, others(88))  # 12 of 100 left, under 1/8
    assert length.depth((*HOT[:5], 77), N) == 1


def test_between_the_thresholds_it_stays_as_it_is():
    length, fresh = KeyLength(window=100), KeyLength(window=100)
    fill(length, [HOT[:5]] * 100)
    assert length.depth((*HOT[:5], 77), N) == 6
    fill(length, others(87))  # 13 of 100: over 1/8, under 2/8
    assert length.depth((*HOT[:5], 77), N) == 6
    fill(fresh, [HOT[:5]] * 13 + others(87))
    assert fresh.depth((*HOT[:5], 77), N) == 1


def test_fewer_replicas_need_shorter_keys():
    length = KeyLength(window=100)
    fill(length, [HOT] * 30 + others(70))
    assert [length.depth(HOT, replicas) for replicas in (1, 2, 6)] == [1, 1, 1]
    assert length.depth(HOT, 7) == 11


def test_memory_is_bounded_by_window_depth_and_table():
    length = KeyLength(window=13, least=1, deepest=3, table=5)
    for turn in range(3000):
        prompt = tuple(range(10 * turn, 10 * turn + 7))
        length.observe(prompt)
        length.depth(prompt, 64)
        assert len(length) <= 13 * 3 + 5
    assert len(length) == 13 * 3 + 5  # and no smaller
