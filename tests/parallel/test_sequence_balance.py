"""ByteScale's scheduler: nothing is lost, ranks are even, and expert groups never wait for a missing micro-batch."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.parallel import BalancedBatches, Folding, MicroBatch, Piece, Schedule, SequenceBalance, SequenceCost

QUADRATIC = SequenceCost(quadratic=1.0, linear=0.0)
LENGTHS = st.lists(st.one_of(st.integers(1, 30), st.integers(1, 300)), max_size=40)


def batch(lengths):
    return np.array(lengths, dtype=np.int64)


def alone(num_ranks):
    """Every rank is an expert group by itself: nothing is padded."""
    return [[rank] for rank in range(num_ranks)]


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(4, 7), st.integers(75, 100), st.sampled_from(["dp", "pp"]), st.integers(1, 9))
def test_schedules_are_valid_and_as_even_as_their_largest_part(lengths, num_ranks, capacity, mode, buckets):
    groups = [list(range(0, num_ranks, 2)), list(range(1, num_ranks, 2))]
    balance = SequenceBalance(num_ranks=num_ranks, capacity=capacity, mode=mode, buckets=buckets, expert_groups=groups)
    schedule = balance.schedule(batch(lengths))
    schedule.check(batch(lengths), capacity, groups)
    assert schedule.tokens_R().sum() == sum(lengths)
    assert schedule.attention_R().sum() == pytest.approx(sum(length**2 for length in lengths))
    largest = max((part.seconds for steps in schedule.micro_batches for part in steps), default=0.0)
    assert np.ptp(schedule.seconds_R()) <= largest + 1e-9


def test_an_example_worked_by_hand():
    # Capacity 4: the sequence of 8 takes two ranks; 3 and 1 make a pack, 2 and 2 another.
    balance = SequenceBalance(num_ranks=3, capacity=4, cost=QUADRATIC)
    schedule = balance.schedule(batch([2, 8, 3, 1, 2]))
    pieces = [[micro_batch.pieces for micro_batch in steps] for steps in schedule.micro_batches]
    # 64 / 2 on ranks 0 and 1; then 9 + 1 and 4 + 4 both on rank 2. Ranks 0 and 1 run an empty micro-batch.
    assert pieces == [[[(1, 0, 4)], []], [[(1, 4, 8)], []], [[(2, 0, 3), (3, 0, 1)], [(0, 0, 2), (4, 0, 2)]]]
    assert schedule.seconds_R().tolist() == [32, 32, 18]
    assert schedule.tokens_R().tolist() == [4, 4, 8]


def test_unequal_numbers_of_micro_batches_are_padded_within_an_expert_group_only():
    lengths = batch([8, 3, 1, 2, 2])
    balance = SequenceBalance(num_ranks=3, capacity=4, cost=QUADRATIC, expert_groups=alone(3))
    schedule = balance.schedule(lengths)
    assert [len(steps) for steps in schedule.micro_batches] == [1, 1, 2]
    schedule.check(lengths, 4, alone(3))
    with pytest.raises(UserError, match=r"Ranks \[0, 2\] share experts but have \[1, 2\] micro-batches"):
        schedule.check(lengths, 4, [[0, 2], [1]])
    padded = replace(balance, expert_groups=[[0, 2], [1]]).schedule(lengths)
    assert [len(steps) for steps in padded.micro_batches] == [2, 1, 2]


def test_packs_fill_the_steps_around_shared_sequences():
    # 11 tokens on both ranks cost 60.5 each, 10 tokens on rank 0 cost 100: still the shared sequence goes first.
    balance = SequenceBalance(num_ranks=2, capacity=10, cost=QUADRATIC, expert_groups=alone(2))
    counts = [len(steps) for steps in balance.schedule(batch([10, 11])).micro_batches]
    assert counts == [2, 1]


def test_the_groups_of_a_folding_fit():
    groups = Folding(num_ranks=4, ep=2).groups("ep").tolist()
    balance = SequenceBalance(num_ranks=4, capacity=10, expert_groups=groups)
    lengths = batch([7, 20, 3, 3, 9, 31])
    balance.schedule(lengths).check(lengths, 10, [[0, 1], [2, 3]])


@pytest.mark.parametrize("seed", range(5))
def test_without_sharing_the_longest_rank_is_within_four_thirds_of_the_best(seed):
    lengths = np.random.default_rng(seed).integers(51, 101, 7)  # none fits beside another: packs of one
    best = min(
        max(sum(int(length) ** 2 for length, rank in zip(lengths, ranks) if rank == r) for r in range(3))
        for ranks in itertools.product(range(3), repeat=7)
    )
    schedule = SequenceBalance(num_ranks=3, capacity=100, cost=QUADRATIC).schedule(lengths)
    assert best <= schedule.seconds_R().max() <= 4 / 3 * best


def test_attention_and_tokens_are_more_even_than_in_turn():
    lengths = np.minimum(np.random.default_rng(0).lognormal(7.5, 1.5, 512), 131_072).astype(np.int64) + 1
    schedule = SequenceBalance(num_ranks=8, capacity=32_768).schedule(lengths)
    in_turn_R = [(lengths[rank::8].astype(float) ** 2).sum() for rank in range(8)]
    assert max(in_turn_R) / np.mean(in_turn_R) > 2.5
    assert schedule.attention_R().max() / schedule.attention_R().mean() < 1.1
    assert schedule.tokens_R().max() / schedule.tokens_R().mean() < 1.15


def test_a_pipeline_keeps_to_one_level_of_length():
    lengths = batch([90] * 4 + [10] * 324)  # equal work: 4 * 8,100 and 324 * 100
    balance = SequenceBalance(num_ranks=2, capacity=90, cost=QUADRATIC, mode="pp", buckets=2, expert_groups=alone(2))
    levels = [
        {lengths[piece.sequence].item() for micro_batch in steps for piece in micro_batch.pieces}
        for steps in balance.schedule(lengths).micro_batches
    ]
    assert levels == [{90}, {10}]
    both = replace(balance, mode="dp").schedule(lengths).micro_batches
    assert [steps[0].pieces[0].end for steps in both] == [90, 90]


def test_hundreds_of_ranks():
    lengths = np.minimum(np.random.default_rng(0).lognormal(8, 1.5, 8_000), 262_144).astype(np.int64) + 1
    balance = SequenceBalance(num_ranks=256, capacity=32_768, expert_groups=alone(256))
    schedule = balance.schedule(lengths)
    schedule.check(lengths, 32_768, alone(256))
    largest = max(part.seconds for steps in schedule.micro_batches for part in steps)
    assert np.ptp(schedule.seconds_R()) <= largest


def test_the_even_cost_weighs_attention_and_tokens_alike():
    cost = SequenceCost.even(batch([1, 3]))
    assert cost.seconds(1) + cost.seconds(3) == pytest.approx(2.0)  # in units of the mean
    assert cost.quadratic * 10 == pytest.approx(cost.linear * 4)


def one(*pieces):
    return MicroBatch(list(pieces), sum(piece.end - piece.start for piece in pieces), 0.0, 0.0)


BROKEN = {
    "lost": ([[one(Piece(0, 0, 4))], [one()]], "has 6 tokens, of which 4"),
    "doubled": ([[one(Piece(0, 0, 6))], [one(Piece(0, 0, 6))]], "lost or doubled at token 6"),
    "a hole": ([[one(Piece(0, 0, 3))], [one(Piece(0, 4, 6))]], "lost or doubled at token 3"),
    "a stranger": ([[one(Piece(0, 0, 6))], [one(Piece(1, 0, 1))]], "do not exist"),
    "too full": ([[one(Piece(0, 0, 9))], [one()]], "9 tokens do not fit"),
    "counted wrong": ([[MicroBatch([Piece(0, 0, 6)], 5, 0.0, 0.0)], [one()]], "do not fit"),
    "one rank twice": ([[one(Piece(0, 0, 3), Piece(0, 3, 6))], [one()]], "different ranks in the same step"),
    "other steps": ([[one(Piece(0, 0, 3)), one()], [one(), one(Piece(0, 3, 6))]], "different ranks in the same step"),
    "a rank waits": ([[one(Piece(0, 0, 6))], []], r"\[0, 1\] micro-batches"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_check_finds(name):
    micro_batches, message = BROKEN[name]
    with pytest.raises(UserError, match=message):
        Schedule(micro_batches).check(batch([6]), 8, [[0, 1]])


def test_the_sampler_visits_every_sequence_once_per_epoch_and_all_ranks_agree():
    lengths = np.random.default_rng(3).integers(1, 50, 23)
    balance = SequenceBalance(num_ranks=3, capacity=40)
    batches = BalancedBatches(length_B=lengths, batch_size=7, balance=balance, seed=5)
    schedules = list(batches)
    assert len(schedules) == 4
    tokens = {}
    for rank in range(3):
        from_rank = list(batches.rank_batches(rank))
        assert from_rank == [part.pieces for schedule in schedules for part in schedule.micro_batches[rank]]
        for piece in itertools.chain.from_iterable(from_rank):
            tokens[piece.sequence] = tokens.get(piece.sequence, 0) + piece.end - piece.start
    assert tokens == dict(enumerate(lengths.tolist()))
    assert list(replace(batches, epoch=1)) != schedules == list(replace(batches))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_ranks": 0}, "at least 1"),
        ({"capacity": 0}, "at least 1"),
        ({"expert_groups": [[0, 1]]}, "every rank exactly once"),
        ({"expert_groups": [[0, 1, 2, 2]]}, "every rank exactly once"),
    ],
)
def test_settings_without_sense_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        SequenceBalance(**({"num_ranks": 3, "capacity": 4} | change))


def test_batches_without_sense_are_refused():
    balance = SequenceBalance(num_ranks=3, capacity=4)
    assert balance.schedule(batch([])).micro_batches == [[], [], []]
    with pytest.raises(UserError, match="13 tokens exceeds the 12"):
        balance.schedule(batch([13]))
    with pytest.raises(UserError, match="at least one token"):
        balance.schedule(batch([0]))
    with pytest.raises(UserError, match="no tokens"):
        SequenceCost.even(batch([]))
    with pytest.raises(UserError, match="negative"):
        SequenceCost(quadratic=-1.0, linear=0.0)
    with pytest.raises(UserError, match="batch_size"):
        list(BalancedBatches(length_B=batch([1]), batch_size=0, balance=balance))
    with pytest.raises(UserError, match="Rank 3"):
        list(BalancedBatches(length_B=batch([1]), batch_size=1, balance=balance).rank_batches(3))
