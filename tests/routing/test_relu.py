import pytest
import torch

from equipoise.routing.relu import Relu
from hand_made import awkward_logits, call_of

E = 11


@pytest.mark.parametrize("name", awkward_logits(E))
def test_values(name):
    logit_TE = awkward_logits(E)[name]
    scores = Relu(E)(call_of(logit_TE, 3))
    for row, gates, probs in zip(logit_TE.tolist(), scores.gate_TE.tolist(), scores.prob_TE.tolist()):
        positive = [max(0.0, z) for z in row]
        assert gates == positive
        assert probs == pytest.approx([z / sum(positive) if sum(positive) else 0 for z in positive], rel=1e-5)
    assert torch.equal(scores.choice_TE, logit_TE)


def test_gradient_is_one_where_it_is_positive():
    logit_TE = torch.randn(7, E, dtype=torch.float64).requires_grad_()
    Relu(E)(call_of(logit_TE, 3)).gate_TE.sum().backward()
    assert torch.equal(logit_TE.grad, (logit_TE > 0).double())
