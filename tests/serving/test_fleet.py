import pytest
from made_up_requests import request

from equipoise import UserError
from equipoise.serving import Fleet


def test_tokens_are_counted_until_they_are_prefilled_and_blocks_until_they_are_finished():
    fleet = Fleet(["a"])
    replica = fleet["a"]
    fleet.send(replica, request(1, (1, 2, 3)), 0.0)
    fleet.send(replica, request(2, (1, 2, 4)), 0.0)
    assert (replica.sent_tokens, replica.running_blocks) == (6 * 512, 6)
    assert fleet.prefilled("a", 1, 1.0)
    assert (replica.sent_tokens, replica.running_blocks) == (3 * 512, 6)
    assert fleet.hit_tokens(replica, request(3, (1, 2, 4))) == 2 * 512
    assert fleet.finished("a", 1, 2.0)
    assert fleet.finished("a", 2, 2.0)  # without a first token: it counts all the same
    assert (replica.sent_tokens, replica.running_blocks, replica.sent, replica.running) == (0, 0, {}, {})


def test_the_last_token_of_a_prompt_is_always_computed():
    fleet = Fleet(["a"])
    fleet.send(fleet["a"], request(1, (1, 2)), 0.0)
    fleet.prefilled("a", 1, 0.0)
    assert fleet.missing(fleet["a"], request(2, (1, 2))) == 1


def test_answers_that_nobody_waits_for_change_nothing():
    fleet = Fleet(["a", "b"])
    fleet.send(fleet["a"], request(1, (1,)), 0.0)
    assert not fleet.prefilled("b", 1, 1.0)
    assert not fleet.finished("z", 1, 1.0)
    assert fleet.prefilled("a", 1, 1.0)
    assert not fleet.prefilled("a", 1, 1.0)
    assert fleet.finished("a", 1, 1.0)
    assert not fleet.finished("a", 1, 1.0)


def test_a_replica_that_owes_an_answer_and_gives_no_sign_is_silent():
    fleet = Fleet(["a", "b", "c"], patience=60.0)
    fleet.send(fleet["a"], request(1, (1,)), 100.0)
    fleet.send(fleet["b"], request(2, (1,)), 100.0)
    assert fleet.silent(160.0) == []
    fleet.heard("b", 150.0)
    assert fleet.silent(160.1) == ["a"]  # c owes nothing
    fleet.prefilled("a", 1, 161.0)
    assert fleet.silent(200.0) == []
    fleet.finished("b", 2, 200.0)
    assert fleet.silent(999.0) == ["a"]  # the rest of its answer


def test_memory_is_bounded_by_the_caches():
    fleet = Fleet(["a", "b"], cache_tokens=7 * 512)
    for id in range(100):
        for replica in fleet:
            fleet.send(replica, request(id, tuple(range(10 * id, 10 * id + 5))), 0.0)
            fleet.prefilled(replica.name, id, 0.0)
    assert fleet.cached_blocks() == 14


def test_limits_out_of_range_are_refused():
    with pytest.raises(UserError, match="at most cache_tokens"):
        Fleet(["a"], cache_tokens=511)
    with pytest.raises(UserError, match="patience"):
        Fleet(["a"], patience=0.0)
