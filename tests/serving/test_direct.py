from made_up_requests import request, warm

from equipoise.serving.direct import DirectRouter, Preble, RoundRobin, affinity, least_loaded, min_ttft
from equipoise.serving.fleet import Fleet

PROMPT = tuple(range(10))


def router_with(choose, held=(0, 0, 0), loads=(0, 0, 0)):
    """Replicas a, b, c that hold the first blocks of the prompt, and compute other blocks."""
    router = DirectRouter(Fleet(["a", "b", "c"]), choose)
    for place, name in enumerate("abc"):
        if held[place]:
            warm(router, name, PROMPT[: held[place]], id=600 + place)
        if loads[place]:
            other = tuple(range(10**6 * (place + 1), 10**6 * (place + 1) + loads[place]))
            router.fleet.send(router.fleet[name], request(500 + place, other), 0.0)
    return router


def test_least_loaded_looks_at_waiting_tokens_only():
    router = router_with(least_loaded, held=(10, 0, 0), loads=(2, 1, 3))
    assert router.submit(request(1, PROMPT), 0.0) == "b"
    assert router.submit(request(2, PROMPT), 0.0) == "a"  # b has 11 now


def test_least_loaded_breaks_ties_by_running_blocks():
    router = router_with(least_loaded, loads=(4, 3, 5))
    for place, name in enumerate("abc"):
        router.on_prefilled(name, 500 + place, 0.0)
    assert router.submit(request(1, PROMPT), 0.0) == "b"


def test_min_ttft_adds_the_own_missing_tokens():
    """a: 6 and 2; b: 1 and 6; c: 0 and 10."""
    router = router_with(min_ttft, held=(8, 4, 0), loads=(6, 1, 0))
    assert router.submit(request(1, PROMPT), 0.0) == "b"


def test_affinity_needs_a_tenth_of_the_prompt():
    router = router_with(affinity, held=(1, 0, 0), loads=(9, 9, 0))
    assert router.submit(request(1, PROMPT), 0.0) == "a"
    assert router.submit(request(2, (0, *range(100, 110))), 0.0) == "c"  # 1 of 11 blocks


def test_preble_uses_a_cache_that_holds_more_than_half_and_else_the_lowest_cost():
    """a holds 6 blocks and was given 20 others."""
    router = router_with(Preble(), held=(6, 0, 0))
    assert router.submit(request(1, (*PROMPT[:6], *range(100, 120))), 0.0) == "a"  # lacks 20 there, 26 elsewhere
    assert router.submit(request(2, (*PROMPT[:6], *range(200, 206))), 0.0) == "b"  # 6 of 12 is not more than half
    assert router.submit(request(3, (*PROMPT[:6], *range(300, 305))), 0.0) == "a"  # 6 of 11 is


def test_preble_forgets_what_was_before_its_window():
    router = router_with(Preble(window=100.0))
    fresh = iter(range(1000, 100_000, 100))

    def send(id, length, now):
        start = next(fresh)
        return router.submit(request(id, tuple(range(start, start + length))), now)

    assert [send(1, 9, 0.0), send(2, 8, 10.0), send(3, 7, 20.0)] == ["a", "b", "c"]
    assert send(4, 3, 30.0) == "c"  # 9, 8, 7
    assert send(5, 1, 105.0) == "a"  # 0, 8, 10


def test_round_robin_takes_turns():
    router = router_with(RoundRobin(), held=(10, 0, 0))
    assert [router.submit(request(id, PROMPT), 0.0) for id in range(5)] == ["b", "c", "a", "b", "c"]


def test_what_is_submitted_is_released_at_once_and_lost_with_its_replica():
    router = router_with(least_loaded)
    for id in range(4):
        router.submit(request(id, PROMPT), 0.0)
    assert router.waiting() == 4
    assert [lost.id for lost in router.remove_replica("a", 0.0)] == [0, 3]
    assert [(name, sent.id) for name, sent in router.release(0.0)] == [("b", 1), ("c", 2)]
    assert (router.release(0.0), router.waiting(), router.load("b")) == ([], 0, 5120)
