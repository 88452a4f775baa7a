from collections import Counter

import numpy as np
import pytest
import torch

from equipoise.errors import UserError
from equipoise.training.batches import Batches, TokenSet, share, validation_batches
from equipoise.training.documents import Document
from equipoise.training.tokenizer import ByteTokenizer


def counting(length):
    """Tokens 0, 1, 2, ...: a window shows where it came from. The domain is the token modulo 3."""
    token_M = np.arange(length, dtype=np.uint32)
    return TokenSet(token_M, (token_M % 3).astype(np.uint8), ("a", "b", "c"))


def domains_of(*lengths):
    sizes = np.array(lengths)
    domain_M = np.repeat(np.arange(len(sizes)), sizes).astype(np.uint8)
    shuffled = np.random.default_rng(0).permutation(domain_M)
    return TokenSet(
        np.arange(len(shuffled), dtype=np.uint16), shuffled, tuple(f"d{number}" for number in range(len(sizes)))
    )


def test_documents_are_joined_by_the_separator(capsys):
    documents = [Document("b", "1", "xy"), Document("a", "2", "z"), Document("b", "3", "w")]
    tokens = TokenSet.build(documents, ByteTokenizer(), ("a", "b", "none"))
    parts = bytes(tokens.token_M.tolist()).split(b"\0")
    assert sorted(parts) == [b"", b"w", b"xy", b"z"]
    assert parts[-1] == b""
    assert tokens.domains == ("a", "b", "none")
    place = {b"xy": 1, b"z": 0, b"w": 1}
    assert tokens.domain_M.tolist() == [place[part] for part in parts[:-1] for _ in range(len(part) + 1)]
    assert capsys.readouterr().err == ""  # no bar where there is no terminal


def test_the_order_of_documents_is_by_content():
    one, other = (
        TokenSet.build([Document("a", str(n * sign), f"text {n}") for n in range(11)][::sign], ByteTokenizer(), ("a",))
        for sign in (1, -1)
    )
    assert one.token_M.tolist() == other.token_M.tolist()
    assert one.token_M.tolist() != sorted(one.token_M.tolist())


def test_domains_have_a_limit():
    domains = tuple(str(number) for number in range(257))
    tokens = TokenSet.build([Document("255", "x", "x")], ByteTokenizer(), domains[:256])
    assert tokens.domain_M.tolist() == [255, 255]
    with pytest.raises(UserError, match="has 257 domains, but 256 are the most"):
        TokenSet.build([Document("255", "x", "x")], ByteTokenizer(), domains)


def test_windows_are_the_text():
    batches = Batches(counting(100), batch_size=3, seq_len=7, seed=5)
    token_BS1, domain_BS1 = batches.batch(step=2)
    assert token_BS1.dtype == torch.int64
    assert token_BS1.shape == (3, 8)
    first = token_BS1[:, :1]
    assert torch.equal(token_BS1, first + torch.arange(8))
    assert (first % 7 == 0).all()
    assert torch.equal(domain_BS1, (token_BS1 % 3).to(torch.uint8))


@pytest.mark.parametrize(("length", "windows"), [(92, 13), (91, 12), (98, 13), (99, 14)])
def test_an_epoch_visits_each_window_once(length, windows):
    batches = Batches(counting(length), batch_size=5, seq_len=7, seed=5)
    assert batches.windows == windows
    starts = [int(start) for step in range(2 * windows) for start in batches.batch(step)[0][:, 0]]
    epochs = [starts[n * windows : (n + 1) * windows] for n in range(10)]
    for epoch in epochs:
        assert sorted(epoch) == [7 * window for window in range(windows)]
    assert len({tuple(epoch) for epoch in epochs}) == 10  # each in an order of its own


def test_every_token_but_the_first_is_a_target_once_in_an_epoch():
    batches = Batches(counting(99), batch_size=7, seq_len=7, seed=5)
    targets = Counter(int(token) for step in range(2) for token in batches.batch(step)[0][:, 1:].flatten())
    assert targets == Counter(range(1, 99))


def test_the_position_needs_no_state():
    tokens = counting(200)
    forward = Batches(tokens, batch_size=3, seq_len=7, seed=11)
    straight = [forward.batch(step)[0] for step in range(23)]
    resumed = Batches(tokens, batch_size=3, seq_len=7, seed=11)
    for step in reversed(range(23)):
        assert torch.equal(resumed.batch(step)[0], straight[step])
    other = Batches(tokens, batch_size=3, seq_len=7, seed=13)
    assert not torch.equal(other.batch(0)[0], straight[0])


@pytest.mark.parametrize(("micros", "world"), [(1, 1), (2, 3), (3, 2), (6, 1), (1, 6)])
def test_micro_batches_and_ranks_divide_the_same_global_batch(micros, world):
    batches = Batches(counting(200), batch_size=6, seq_len=7, seed=3)
    parts = [batches.batch(4, micro, micros, rank, world) for micro in range(micros) for rank in range(world)]
    whole = batches.batch(4)
    for part, expected in zip(zip(*parts), whole):
        assert torch.equal(torch.cat(part), expected)
    assert {len(token_BS1) for token_BS1, _ in parts} == {6 // (micros * world)}


def test_shares_that_do_not_divide():
    assert share(12, micro=1, micros=2, rank=2, world=3) == slice(10, 12)
    for size in (7, 3, 0):
        with pytest.raises(
            UserError,
            match=f"global batch of {size} sequences does not divide by 2 micro-batches on 3 ranks; "
            "choose a multiple of 6",
        ):
            share(size, 0, 2, 0, 3)


def test_a_text_shorter_than_a_sequence_gives_the_figures():
    assert Batches(counting(8), 2, 7, 0).batch(0)[0].tolist() == [[*range(8)], [*range(8)]]
    assert len(validation_batches(counting(8), 1, 7, 10**6)) == 3
    for attempt in (lambda: Batches(counting(7), 2, 7, 0), lambda: validation_batches(counting(7), 2, 7, 9)):
        with pytest.raises(UserError, match="has 7 tokens, but one sequence of seq_len 7 takes 8; give more text"):
            attempt()


def test_validation_is_balanced_over_domains():
    tokens = domains_of(900, 150, 300)
    batches = validation_batches(tokens, batch_size=4, seq_len=5, max_tokens=3 * 5 * 20)
    assert [len(token_BS1) for token_BS1, _ in batches] == [4] * 15
    domain_NS1 = torch.cat([domain_BS1 for _, domain_BS1 in batches])
    assert (domain_NS1 == domain_NS1[:, :1]).all()
    assert torch.bincount(domain_NS1[:, 0]).tolist() == [20, 20, 20]
    token_NS1 = torch.cat([token_BS1 for token_BS1, _ in batches])
    assert (torch.from_numpy(tokens.domain_M)[token_NS1] == domain_NS1).all()
    assert len({int(token) for token in token_NS1[:, 1:].flatten()}) == 300  # no target twice
    first = token_NS1[domain_NS1[:, 0] == 0][:, 0]
    assert first.max() - first.min() > 1000  # spread over the domain's text, not its beginning


def test_a_small_domain_gives_what_it_has():
    tokens = domains_of(900, 26, 300)
    domain_NS1 = torch.cat([batch[1] for batch in validation_batches(tokens, 3, 5, 10**6)])
    assert torch.bincount(domain_NS1[:, 0]).tolist() == [(900 - 1) // 5, 5, (300 - 1) // 5]


def test_validation_holds_every_domain_even_the_tiniest():
    for lengths in [(2, 40, 1), (40, 2, 1), (3, 3, 3)]:
        domain_NS1 = torch.cat([batch[1] for batch in validation_batches(domains_of(*lengths), 2, 5, 1)])
        assert len(domain_NS1) == 3
        assert set(domain_NS1.flatten().tolist()) == {0, 1, 2}


def test_validation_is_the_same_every_time():
    one, other = (validation_batches(domains_of(90, 30), 2, 5, 60) for _ in range(2))
    assert all(torch.equal(a, b) for left, right in zip(one, other) for a, b in zip(left, right))
    assert len(one) == 6


def test_a_domain_without_tokens_is_left_out():
    tokens = TokenSet(np.arange(50, dtype=np.uint16), np.full(50, 2, np.uint8), ("a", "b", "c", "d"))
    (batch,) = validation_batches(tokens, 9, 7, 10**6)
    assert batch[0][:, 0].tolist() == [0, 7, 14, 21, 28, 35, 42]
    assert set(batch[1].flatten().tolist()) == {2}
