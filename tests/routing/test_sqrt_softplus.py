import math

import pytest
import torch

from equipoise.routing.sqrt_softplus import SqrtSoftplus
from hand_made import awkward_logits, call_of

E = 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values(dtype):
    logits = [-45.0, -30.0, -3.0, 0.0, 0.1, 3.0, 19.0, 25.0, 80.0, 1000.0]
    scores = SqrtSoftplus(len(logits))(call_of(torch.tensor([logits], dtype=dtype), 2))
    expected = [math.sqrt(math.log1p(math.exp(value)) if value < 700 else value) for value in logits]
    torch.testing.assert_close(scores.gate_TE, torch.tensor([expected], dtype=dtype), rtol=1e-6, atol=0)
    torch.testing.assert_close(scores.prob_TE * math.fsum(expected), scores.gate_TE, rtol=1e-6, atol=0)
    assert torch.equal(scores.gate_TE, scores.choice_TE)


def test_gradient_is_the_closed_form_down_to_the_floor_and_zero_below():
    logit_TE = torch.tensor([[-500.0, -80.0, -47.0, -45.0, -3.0, 0.0, 3.0, 80.0]], dtype=torch.float64)
    logit_TE.requires_grad_()
    SqrtSoftplus(8)(call_of(logit_TE, 2)).gate_TE.sum().backward()
    floor = math.log(1e-20)

    def slope(value):
        return 0 if value < floor else 1 / (1 + math.exp(-value)) / (2 * math.sqrt(math.log1p(math.exp(value))))

    expected = torch.tensor([[slope(value) for value in logit_TE[0].tolist()]], dtype=torch.float64)
    torch.testing.assert_close(logit_TE.grad, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", awkward_logits(E))
def test_it_stays_positive_and_finite_and_keeps_the_order(name):
    logit_TE = awkward_logits(E)[name]
    scores = SqrtSoftplus(E)(call_of(logit_TE, 3))
    assert (scores.gate_TE > 0).all()
    assert (scores.gate_TE < math.inf).all()
    torch.testing.assert_close(scores.prob_TE.sum(1), torch.ones(len(logit_TE)), rtol=1e-5, atol=0)
    order_TE = logit_TE.argsort(dim=1, stable=True)
    assert (scores.choice_TE.gather(1, order_TE).diff(dim=1) >= 0).all()
