import math

import pytest
import torch

from equipoise.routing.softmax import Softmax
from hand_made import awkward_logits, call_of

E, K = 11, 3


def test_two_experts_are_a_logistic_curve():
    difference = torch.tensor([-80.0, -3.0, 0.0, 0.5, 80.0])
    scores = Softmax(2)(call_of(torch.stack([difference, torch.zeros(5)], 1), 1))
    expected = [1 / (1 + math.exp(-value)) for value in difference.tolist()]
    torch.testing.assert_close(scores.prob_TE[:, 0], torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", awkward_logits(E))
def test_losses_gate_and_choice_read_one_distribution(name):
    scores = Softmax(E)(call_of(awkward_logits(E)[name], K))
    torch.testing.assert_close(scores.prob_TE.sum(1), torch.ones(len(scores.prob_TE)), rtol=1e-6, atol=0)
    assert torch.equal(scores.prob_TE, scores.gate_TE)
    assert torch.equal(scores.prob_TE, scores.choice_TE)


def test_equal_logits_give_equal_shares():
    scores = Softmax(E)(call_of(torch.full((3, E), -80.0), K))
    torch.testing.assert_close(scores.prob_TE, torch.full((3, E), 1 / E), rtol=1e-6, atol=0)
