import pytest
import torch
import torch.nn.functional as F

from equipoise.contracts import Call
from equipoise.errors import UserError
from equipoise.routing.cosine import Cosine

T, D, E = 13, 7, 5


def score(x_TD, weight_ED, **settings):
    scorer = Cosine(E, **settings).double()
    router = scorer.make_router(D).double()
    router.weight = torch.nn.Parameter(weight_ED)
    step, sequence_T = torch.zeros((), dtype=torch.int64), torch.zeros(len(x_TD), dtype=torch.int64)
    call = Call(x_TD, None, sequence_T, 2, step, E, router, torch.nn.Identity(), True)
    return scorer(call), scorer, router


@pytest.mark.parametrize("temperature", [0.5, 0.01, 2.0])
def test_it_is_torchs_cosine_over_the_temperature(temperature):
    x_TD, weight_ED = torch.randn(T, D).double() * 30, torch.randn(E, D).double() / 30
    scores, _, _ = score(x_TD, weight_ED, temperature=temperature)
    expected = F.cosine_similarity(x_TD[:, None], weight_ED[None], dim=-1) / temperature
    torch.testing.assert_close(scores.logit_TE, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(scores.prob_TE, expected.softmax(-1), rtol=1e-5, atol=1e-9)
    assert torch.equal(scores.gate_TE, scores.prob_TE)
    assert torch.equal(scores.choice_TE, scores.prob_TE)


def test_lengths_change_nothing_and_zero_tokens_are_finite():
    x_TD, weight_ED = torch.randn(T, D).double(), torch.randn(E, D).double()
    one, other = (score(a * x_TD, b * weight_ED)[0].logit_TE for a, b in ((1, 1), (1e3, 1e-3)))
    torch.testing.assert_close(other, one, rtol=1e-9, atol=0)
    x_TD = torch.zeros(3, D, dtype=torch.float64).requires_grad_()
    scores, _, router = score(x_TD, weight_ED)
    assert torch.equal(scores.logit_TE, torch.zeros(3, E).double())
    scores.gate_TE.square().sum().backward()
    assert router.weight.grad.isfinite().all()


def test_the_temperature_learns_and_has_a_bound():
    x_TD, weight_ED = torch.randn(T, D).double(), torch.randn(E, D).double()
    scores, scorer, _ = score(x_TD, weight_ED)
    scores.gate_TE[:, 0].sum().backward()
    assert scorer.log_scale.grad.abs() > 1e-3
    bound = score(x_TD, weight_ED, temperature=0.01)[0].logit_TE
    with torch.no_grad():
        scorer.log_scale.fill_(50.0)
    step, sequence_T = torch.zeros((), dtype=torch.int64), torch.zeros(T, dtype=torch.int64)
    router = score(x_TD, weight_ED)[2]
    beyond = scorer(Call(x_TD, None, sequence_T, 2, step, E, router, torch.nn.Identity(), True)).logit_TE
    torch.testing.assert_close(beyond, bound, rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, 0.005, float("inf"), float("nan")])
def test_an_impossible_temperature_is_refused(temperature):
    with pytest.raises(UserError, match=r"at least 0\.01"):
        Cosine(E, temperature=temperature)
