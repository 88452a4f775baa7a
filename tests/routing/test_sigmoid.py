import math

import pytest
import torch

from equipoise.balancing.bias import Bias
from equipoise.routing.sigmoid import Sigmoid
from equipoise.routing.top_k import TopK
from hand_made import awkward_logits, call_of, dense, dense_of

E, K = 11, 3
BIASES = {
    "no_bias": torch.zeros(E),
    "small_bias": torch.linspace(-0.05, 0.05, E).flip(0),
    "bias_that_decides_alone": torch.arange(E) * 2.0,
}


@pytest.fixture(scope="module", params=[True, False], ids=["normalised", "raw"])
def deepseek_router(request):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=E,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        norm_topk_prob=request.param,
    )
    router = DeepseekV3TopkRouter(config)
    router.weight.data.copy_(torch.eye(E))
    return router


@pytest.mark.parametrize("name", awkward_logits(E))
@pytest.mark.parametrize("bias", BIASES)
def test_with_a_bias_it_is_deepseek_v3s_router(deepseek_router, bias, name):
    logit_TE, balancer = awkward_logits(E)[name], Bias(E)
    deepseek_router.e_score_correction_bias.copy_(BIASES[bias])
    balancer.bias_E.copy_(BIASES[bias])
    _, weight_TK, expert_TK = deepseek_router(logit_TE)
    call = call_of(logit_TE, K)
    scores = balancer.adjust(call, Sigmoid(E)(call))
    routing = TopK(E, renormalize=deepseek_router.norm_topk_prob)(call, scores)
    weight_TE, chosen_TE = dense(routing, len(logit_TE))
    expected_TE, expected_chosen_TE = dense_of(weight_TK.detach(), expert_TK, E)
    assert torch.equal(chosen_TE, expected_chosen_TE)
    torch.testing.assert_close(weight_TE, expected_TE, rtol=1e-6, atol=0)


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
