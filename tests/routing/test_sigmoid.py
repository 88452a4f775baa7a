import math

import torch

from equipoise.routing.sigmoid import Sigmoid
from hand_made import call_of

E, K = 11, 3


def test_known_values():
    logit_TE = torch.tensor([[0.0, math.log(3), -math.log(3), 80.0, -80.0]])
    scores = Sigmoid(5)(call_of(logit_TE, 2))
    expected = torch.tensor([[0.5, 0.75, 0.25, 1.0, math.exp(-80)]])
    torch.testing.assert_close(scores.gate_TE, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(scores.prob_TE, expected / 2.5, rtol=1e-5, atol=0)
    assert torch.equal(scores.gate_TE, scores.choice_TE)


def test_every_expert_is_scored_by_itself():
    logit_TE = torch.randn(7, E)
    changed_TE = logit_TE.clone()
    changed_TE[:, 4] += 3
    before, after = (Sigmoid(E)(call_of(logits, K)) for logits in (logit_TE, changed_TE))
    others = [e for e in range(E) if e != 4]
    assert torch.equal(before.gate_TE[:, others], after.gate_TE[:, others])
    assert (after.gate_TE[:, 4] > before.gate_TE[:, 4]).all()
    assert (after.prob_TE[:, others] < before.prob_TE[:, others]).all()


def test_what_losses_read_sums_to_one_over_all_experts():
    prob_TE = Sigmoid(E)(call_of(torch.randn(7, E) * 5, K)).prob_TE
    torch.testing.assert_close(prob_TE.sum(1), torch.ones(7), rtol=1e-6, atol=0)
