import pytest
import torch

from equipoise.routing.rows import pack, unmasked, weigh
from hand_made import call_of, check_order, scores_of

GATE_TE = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])


def test_pack_sorts_by_expert_then_token_and_counts():
    token_N, expert_N = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, 0, 0, 3, 2])
    weight_N = torch.tensor([0.2, 0.5, 0.1, 0.0, 0.3])
    routing = pack(scores_of(GATE_TE), token_N, expert_N, weight_N)
    check_order(routing)
    assert routing.expert_N.tolist() == [0, 0, 2, 2, 3]
    assert routing.token_N.tolist() == [0, 1, 0, 1, 1]
    assert routing.weight_N.tolist() == pytest.approx([0.5, 0.1, 0.2, 0.3, 0.0])
    assert routing.load_E.tolist() == [2, 0, 2]
    assert routing.dropped_E.tolist() == [0, 0, 0]


def test_pack_keeps_the_counts_of_dropped_rows_beside_the_load():
    dropped_E = torch.tensor([4, 0, 1])
    routing = pack(scores_of(GATE_TE), torch.tensor([0]), torch.tensor([1]), torch.ones(1), dropped_E)
    assert routing.load_E.tolist() == [0, 1, 0]
    assert routing.demand_E().tolist() == [4, 1, 1]


def test_pack_sorts_any_number_of_experts():
    expert_N = torch.tensor([39_999, 7, 32_768, 32_767, 40_000])
    routing = pack(scores_of(torch.rand(5, 40_000)), torch.arange(5), expert_N, torch.tensor([1.0, 1, 1, 1, 0]))
    check_order(routing)
    assert routing.expert_N.tolist() == [7, 32_767, 32_768, 39_999, 40_000]


def test_pack_of_no_rows():
    none = torch.zeros(0, dtype=torch.int64)
    routing = pack(scores_of(GATE_TE), none, none, torch.zeros(0))
    assert routing.load_E.tolist() == [0, 0, 0]
    assert len(routing.token_N) == len(routing.weight_N) == 0


def test_weigh_reads_the_gate_and_gives_unused_rows_nothing():
    token_N, expert_N = torch.tensor([0, 1, 1, 0]), torch.tensor([2, 1, 3, 0])
    weight_N = weigh(scores_of(GATE_TE), token_N, expert_N, renormalize=False)
    assert weight_N.tolist() == pytest.approx([0.2, 0.6, 0.0, 0.5])
    weight_N = weigh(scores_of(GATE_TE), token_N, expert_N, renormalize=True)
    assert weight_N.tolist() == pytest.approx([0.2 / 0.7, 1.0, 0.0, 0.5 / 0.7])


def test_weights_of_a_token_without_any_gate_are_zero_with_a_finite_gradient():
    gate_TE = torch.zeros(2, 3, requires_grad=True)
    weight_N = weigh(scores_of(gate_TE), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 3]), renormalize=True)
    weight_N.square().sum().backward()
    assert weight_N.tolist() == [0, 0, 0]
    assert gate_TE.grad.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_unmasked_turns_the_rows_of_padding_into_rows_without_use():
    token_N, expert_N = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 0, 1, 2])
    call = call_of(GATE_TE, 2, mask_T=torch.tensor([False, True]))
    assert unmasked(call, token_N, expert_N, 3).tolist() == [3, 3, 1, 2]
    assert unmasked(call_of(GATE_TE, 2), token_N, expert_N, 3) is expert_N
