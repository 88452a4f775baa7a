"""Limits are in blocks here: `blocks_limit` makes the SLO such that a replica is within it up to so many blocks."""

import pytest
from made_up_requests import BLOCK, request, warm

from equipoise import UserError
from equipoise.serving import DualMap, DualMapSettings

PROMPT = tuple(range(12))


def blocks_limit(blocks, **more):
    return DualMapSettings(slo=5.0, slo_fraction=0.5, prefill_seconds=2.5 / (blocks * BLOCK), **more)


def load(router, name, blocks, id=500):
    """Let a replica compute so many blocks of something else."""
    if blocks:
        router.fleet.send(router.fleet[name], request(id, tuple(range(10**6 + id, 10**6 + id + blocks))), 0.0)


def pair_of_two(settings, held, loads):
    """Replicas a and b that hold the first blocks of the prompt, and compute other blocks."""
    router = DualMap(["a", "b"], settings)
    for place, name in enumerate("ab"):
        if held[place]:
            warm(router, name, PROMPT[: held[place]], id=600 + place)
        load(router, name, loads[place], id=500 + place)
    return router


def test_the_published_limit_is_15625_tokens():
    assert DualMapSettings().route_limit == pytest.approx(15_625)
    assert DualMapSettings(rebalance_multiple=2.0).overload_limit == pytest.approx(31_250)
    assert DualMapSettings(prefill_seconds=1.27e-4).route_limit == pytest.approx(19_685, abs=1)


@pytest.mark.parametrize(("waiting", "chosen"), [(2, "a"), (3, "b")])
def test_the_own_missing_tokens_count(waiting, chosen):
    """a lacks 8 of 12 blocks, b 10. With 2 waiting a is at the limit of 10; with 3 above it, at 11 to b's 10."""
    router = pair_of_two(blocks_limit(10), held=(4, 2), loads=(waiting, 0))
    assert router.submit(request(1, PROMPT), 0.0) == chosen


def test_above_the_limit_the_lower_time_to_first_token_wins_not_the_lower_load():
    """a: 3 waiting and 8 own; b: 2 waiting, so less loaded, and 12 own."""
    router = pair_of_two(blocks_limit(10), held=(4, 0), loads=(3, 2))
    assert router.submit(request(1, PROMPT), 0.0) == "a"


@pytest.mark.parametrize(("slo", "chosen"), [(float("inf"), "a"), (0.0, "b")])
def test_an_endless_slo_is_affinity_of_two_and_none_is_min_ttft_of_two(slo, chosen):
    router = pair_of_two(DualMapSettings(slo=slo), held=(1, 0), loads=(500, 1))
    assert router.submit(request(1, PROMPT), 0.0) == chosen


def test_equal_prefixes_go_to_fewer_running_blocks_and_else_either_way():
    router = pair_of_two(blocks_limit(100), held=(4, 4), loads=(0, 0))
    chosen = [router._choose(request(id, PROMPT), *router.fleet).name for id in range(200)]
    assert 70 < chosen.count("a") < 130
    other_seed = pair_of_two(blocks_limit(100, seed=1), held=(4, 4), loads=(0, 0))
    assert chosen != [other_seed._choose(request(id, PROMPT), *other_seed.fleet).name for id in range(200)]
    load(router, "a", 1)
    router.fleet.prefilled("a", 500, 0.0)  # its block still runs
    assert {router._choose(request(id, PROMPT), *router.fleet).name for id in range(200)} == {"b"}


def test_a_replica_gets_one_prompt_at_a_time_and_the_longest_prefix_first():
    router = DualMap(["only"])
    warm(router, "only", (1, 2))
    for id, blocks in enumerate([(7, 8, 9), (5, 6), (1, 2, 3)]):
        assert router.submit(request(id, blocks), 0.0) == "only"
    released = []
    for _ in range(3):
        ((name, sent),) = router.release(0.5)
        assert router.release(0.5) == []
        released.append(sent.id)
        router.on_prefilled(name, sent.id, 0.5)
    assert released == [2, 0, 1]
    assert router.waiting() == 0


def test_nobody_is_overtaken_after_the_longest_wait():
    router = DualMap(["only"], DualMapSettings(max_wait=3.0))
    warm(router, "only", (1, 2))
    router.submit(request(0, (7, 8)), 0.0)
    router.submit(request(1, (1, 2, 3)), 2.0)
    router.submit(request(2, (1, 2, 4)), 2.0)
    ((_, first),) = router.release(2.9)
    router.on_prefilled("only", first.id, 3.0)
    ((_, second),) = router.release(3.0)
    assert [first.id, second.id] == [1, 0]


def test_two_prompts_at_a_time_only_while_the_replica_is_fresh():
    router = DualMap(["only"], DualMapSettings(in_flight=2, fresh_seconds=2.0))
    for id in range(4):
        router.submit(request(id, (10 * id, 10 * id + 1)), 0.0)
    assert [sent.id for _, sent in router.release(0.0)] == [0]  # it has never finished one
    router.on_prefilled("only", 0, 1.0)
    assert [sent.id for _, sent in router.release(1.5)] == [1, 2]
    router.on_finished("only", 0, 1.6)
    assert router.release(1.6) == []


def test_equal_requests_and_times_give_equal_decisions():
    def decisions():
        router = DualMap(list("abcde"), blocks_limit(3))
        found = []
        for id in range(90):
            now = id / 10
            found.append(router.submit(request(id, (id % 7, 100 + id % 13, 1000 + id)), now))
            for name, sent in router.release(now):
                found.append((name, sent.id))
                router.on_prefilled(name, sent.id, now)
        return found

    assert decisions() == decisions()


def test_a_lost_replica_hands_back_what_was_sent_and_what_waited():
    router = DualMap(["a", "b"], blocks_limit(100))
    warm(router, "a", PROMPT[:4])
    for id in range(3):
        assert router.submit(request(id, PROMPT), 0.0) == "a"
    assert [sent.id for _, sent in router.release(0.0)] == [0]
    assert [lost.id for lost in router.remove_replica("a", 1.0)] == [0, 1, 2]
    assert (router.waiting(), len(router.fleet)) == (0, 1)
    router.on_prefilled("a", 0, 1.0)  # too late: nobody waits for it
    assert router.submit(request(0, PROMPT), 1.0) == "b"
    router.on_prefilled("a", 0, 1.0)
    assert router.load("b") == 12 * BLOCK


def test_who_waits_elsewhere_gets_another_second_replica():
    router = DualMap(["a", "b", "c"], blocks_limit(100))
    for id in range(30):
        router.submit(request(id, (id, 100 + id)), 0.0)
    lost = router.remove_replica("b", 0.0)
    assert router.waiting() + len(lost) == 30
    for name, other in (("a", "c"), ("c", "a")):
        queue = router._queues[name]
        assert queue.others() == [other]
        assert {waiting.home for waiting in queue.all()} == {name}


def test_a_new_replica_takes_part():
    router = DualMap(["a"], blocks_limit(100))
    router.add_replica("b", 0.0)
    assert {router.submit(request(id, (id,)), 0.0) for id in range(20)} == {"a", "b"}


def test_no_replica_and_two_of_one_name_are_refused():
    with pytest.raises(UserError, match="at least one replica"):
        DualMap([])
    with pytest.raises(UserError, match="already a replica 'a'"):
        DualMap(["a", "a"])
    router = DualMap(["a"])
    with pytest.raises(UserError, match="no replica 'z'"):
        router.remove_replica("z", 0.0)
    router.remove_replica("a", 0.0)
    with pytest.raises(UserError, match="All replicas are down"):
        router.submit(request(0, (1,)), 0.0)


@pytest.mark.parametrize(
    "wrong", [{"slo": -1.0}, {"prefill_seconds": 0.0}, {"in_flight": 0}, {"max_wait": 0.0}, {"window": 0}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        DualMapSettings(**wrong)
