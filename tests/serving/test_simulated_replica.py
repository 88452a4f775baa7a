"""Times by hand: 0.5 s per block alone, 0.1 s per decoding step, 1e-5 s per token of context, 0.001 s per hit token."""

import pytest
from made_up_requests import BLOCK, request

from equipoise import UserError
from equipoise.serving import Costs
from equipoise.serving.simulated_replica import SimulatedReplica

COSTS = Costs(
    prefill_seconds=0.5 / BLOCK,
    hit_seconds=0.001,
    decode_seconds=0.1,
    context_seconds=1e-5,
    kv_tokens=10 * BLOCK,
    cache_tokens=20 * BLOCK,
)


def events(replica, until=float("inf")):
    found = []
    while (at := replica.next_time()) <= until and at < float("inf"):
        kind, done, hit = replica.happen(at)
        found.append((kind, done.id, hit, pytest.approx(at)))
    return found


def test_one_request_alone():
    """3 blocks, then 6 tokens at 0.1 s and a context of 1536 + 7 // 2 tokens."""
    replica = SimulatedReplica(COSTS, 0.0)
    replica.accept(request(1, (1, 2, 3), output_tokens=7), 2.0)
    assert events(replica) == [("prefilled", 1, 0, 3.5), ("finished", 1, 0, 3.5 + 6 * (0.1 + 1539e-5))]


def test_an_answer_of_one_token_ends_with_the_prompt():
    replica = SimulatedReplica(COSTS, 0.0)
    replica.accept(request(1, (1,), output_tokens=1), 0.0)
    assert events(replica) == [("prefilled", 1, 0, 0.5), ("finished", 1, 0, 0.5)]


def test_cached_blocks_are_read_and_the_last_token_is_computed():
    replica = SimulatedReplica(COSTS, 0.0)
    replica.accept(request(1, (1, 2), output_tokens=1), 0.0)
    events(replica)
    replica.accept(request(2, (1, 2), output_tokens=1), 5.0)
    after = 5.0 + 1023 * 0.001 + 0.5 / BLOCK
    assert events(replica) == [("prefilled", 2, 1023, after), ("finished", 2, 1023, after)]


def test_prompts_and_running_requests_slow_each_other_down():
    """A step takes a chunk's 0.5 s, a token's time, and the first one's context; it serves both."""
    replica = SimulatedReplica(COSTS, 0.0)
    replica.accept(request(1, (1,), output_tokens=4), 0.0)
    replica.accept(request(2, (2, 3), output_tokens=1), 0.0)
    step = 0.5 + 0.5 / BLOCK + 514e-5
    first, second = 0.5, 0.5 + 2 * step  # two chunks, and two of the first one's three tokens
    assert events(replica)[:3] == [
        ("prefilled", 1, 0, first),
        ("prefilled", 2, 0, second),
        ("finished", 2, 0, second),
    ]


def test_a_prompt_waits_until_the_device_has_room():
    """6 and 6 blocks do not fit into 10: the second starts when the first has finished, at its last token."""
    replica = SimulatedReplica(COSTS, 0.0)
    replica.accept(request(1, tuple(range(6)), output_tokens=3), 0.0)
    replica.accept(request(2, tuple(range(10, 16)), output_tokens=1), 0.0)
    end = 3.0 + 2 * (0.1 + (6 * BLOCK + 1) * 1e-5)
    assert events(replica) == [
        ("prefilled", 1, 0, 3.0),
        ("finished", 1, 0, end),
        ("prefilled", 2, 0, end + 3.0),
        ("finished", 2, 0, end + 3.0),
    ]


def test_an_arrival_on_the_way_loses_no_work():
    replica, undisturbed = SimulatedReplica(COSTS, 0.0), SimulatedReplica(COSTS, 0.0)
    for one in (replica, undisturbed):
        one.accept(request(1, (1, 2, 3), output_tokens=5), 0.0)
    for now in (0.3, 0.7, 1.1):
        replica.next_time()
        replica._advance(now)
    assert events(replica) == events(undisturbed)


def test_pending_are_the_tokens_that_are_neither_computed_nor_cached():
    """A block takes 0.5 s; of the second prompt one block of two is cached, of the third one the last token counts."""
    replica = SimulatedReplica(COSTS, 0.0)
    replica.accept(request(0, (1,), output_tokens=1), 0.0)
    events(replica)
    assert replica.pending_tokens(1.0) == 0
    replica.accept(request(1, (7, 8, 9), output_tokens=1), 2.0)
    assert replica.pending_tokens(2.25) == 5 * BLOCK // 2
    replica.accept(request(2, (1, 2), output_tokens=1), 2.5)
    assert replica.pending_tokens(2.5) == 3 * BLOCK
    replica.accept(request(3, (1,), output_tokens=1), 2.5)
    assert replica.pending_tokens(3.0) == 2 * BLOCK + 1
    events(replica)
    assert replica.pending_tokens(9.0) == 0


def test_costs_must_be_positive():
    with pytest.raises(UserError, match="kv_tokens must be above 0"):
        Costs(kv_tokens=0)
