import math

import pytest
import torch

from equipoise.routing.softmax import Softmax
from equipoise.routing.top_k import TopK
from hand_made import awkward_logits, call_of, dense, dense_of

E, K = 11, 3


@pytest.fixture(scope="module")
def mixtral_router():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    return MixtralTopKRouter(MixtralConfig(hidden_size=E, num_local_experts=E, num_experts_per_tok=K))


@pytest.fixture(scope="module")
def olmoe_router():
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

    return OlmoeTopKRouter(OlmoeConfig(hidden_size=E, num_experts=E, num_experts_per_tok=K, norm_topk_prob=False))


def check_against(router, renormalize, name):
    logit_TE = awkward_logits(E)[name]
    router.weight.data.copy_(torch.eye(E))
    logits, weight_TK, expert_TK = router(logit_TE)
    call = call_of(logit_TE, K)
    scores = Softmax(E)(call)
    assert torch.equal(scores.logit_TE, logits)
    weight_TE, chosen_TE = dense(TopK(E, renormalize=renormalize)(call, scores), len(logit_TE))
    expected_TE, expected_chosen_TE = dense_of(weight_TK.detach(), expert_TK, E)
    assert torch.equal(chosen_TE, expected_chosen_TE)
    torch.testing.assert_close(weight_TE, expected_TE, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", awkward_logits(E))
@pytest.mark.parametrize("renormalize", [None, True])
def test_renormalised_it_is_mixtrals_router(mixtral_router, renormalize, name):
    check_against(mixtral_router, renormalize, name)


@pytest.mark.parametrize("name", awkward_logits(E))
def test_without_renormalisation_it_is_olmoes_router(olmoe_router, name):
    check_against(olmoe_router, False, name)


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
