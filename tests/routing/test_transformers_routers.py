"""Our parts against the routers of Hugging Face Transformers: the same experts and weights, also on awkward inputs.

The router of gpt-oss adds a bias to its logits, which ours does not have: it is given the sum as its input.
"""

from dataclasses import replace

import pytest
import torch

from equipoise.balancing.bias import Bias
from equipoise.routing.sigmoid import Sigmoid
from equipoise.routing.softmax import Softmax
from equipoise.routing.top_k import TopK
from hand_made import awkward_logits, call_of, dense, dense_of

E, K = 12, 4
AWKWARD = awkward_logits(E)
BIASES = {
    "no_bias": torch.zeros(E),
    "small_bias": torch.linspace(-0.05, 0.05, E).flip(0),
    "bias_that_decides_alone": torch.arange(E) * 2.0,
    "biased_scores_below_zero": -torch.arange(E) * 2.0,  # a group that is shut must not win with a 0
}


def mixtral():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    return MixtralTopKRouter(MixtralConfig(hidden_size=E, num_local_experts=E, num_experts_per_tok=K))


def olmoe():
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

    return OlmoeTopKRouter(OlmoeConfig(hidden_size=E, num_experts=E, num_experts_per_tok=K, norm_topk_prob=False))


def qwen3(renormalize):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    sizes = {"hidden_size": E, "num_experts": E, "num_experts_per_tok": K}
    return Qwen3MoeTopKRouter(Qwen3MoeConfig(**sizes, norm_topk_prob=renormalize))


def deepseek_v3(renormalize, groups, kept_groups, scale):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    sizes = {"hidden_size": E, "n_routed_experts": E, "num_experts_per_tok": K, "n_group": groups}
    rest = {"topk_group": kept_groups, "norm_topk_prob": renormalize, "routed_scaling_factor": scale}
    return DeepseekV3TopkRouter(DeepseekV3Config(**sizes, **rest))


def gpt_oss():
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    return GptOssTopKRouter(GptOssConfig(hidden_size=E, num_local_experts=E, num_experts_per_tok=K)).double()


def check(router, logit_TE, score, selector):
    """Given tokens that are the logits, the router and our parts choose the same, weigh it alike and learn alike."""
    router.weight.data.copy_(torch.eye(E))
    theirs_TE, ours_TE = logit_TE.clone().requires_grad_(), logit_TE.clone().requires_grad_()
    logits, weight_TK, expert_TK = router(theirs_TE)
    call = call_of(ours_TE, K)
    scores = score(call)
    assert torch.equal(scores.logit_TE, logits)
    weight_TE, chosen_TE = dense(selector(call, scores), len(logit_TE))
    expected_TE, expected_chosen_TE = dense_of(weight_TK, expert_TK, E)
    assert torch.equal(chosen_TE, expected_chosen_TE)
    torch.testing.assert_close(weight_TE, expected_TE, rtol=1e-6, atol=0)
    factor_TE = torch.randn(weight_TE.shape, generator=torch.Generator().manual_seed(1)).to(weight_TE.dtype)
    for value_TE in (weight_TE, expected_TE):
        (value_TE * factor_TE).sum().backward()
    torch.testing.assert_close(ours_TE.grad, theirs_TE.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize(
    ("make", "renormalize"),
    [
        (mixtral, None),
        (mixtral, True),
        (olmoe, False),
        (lambda: qwen3(True), True),
        (lambda: qwen3(False), False),
    ],
    ids=["mixtral-default", "mixtral", "olmoe", "qwen3", "qwen3-raw"],
)
def test_softmax_routers(make, renormalize, name):
    check(make(), AWKWARD[name], Softmax(E), TopK(E, renormalize=renormalize))


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(
    ("renormalize", "groups", "kept_groups", "scale"),
    [(True, 1, 1, 1.0), (False, 1, 1, 1.0), (True, 4, 2, 2.5), (False, 3, 2, 0.5), (True, 2, 2, 2.5)],
)
def test_deepseek_v3s_router(renormalize, groups, kept_groups, scale, bias, name):
    """It adds the two best of each group whatever K is, as here K / kept_groups is."""
    router, balancer = deepseek_v3(renormalize, groups, kept_groups, scale), Bias(E)
    router.e_score_correction_bias.copy_(BIASES[bias])
    balancer.bias_E.copy_(BIASES[bias])
    selector = TopK(E, renormalize=renormalize, groups=groups, kept_groups=kept_groups, scale=scale)
    check(router, AWKWARD[name], lambda call: balancer.adjust(call, Sigmoid(E)(call)), selector)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("bias", ["no_bias", "small_bias", "bias_that_decides_alone"])
def test_gpt_osss_router(bias, name):
    """A softmax over the chosen logits is one over all of them, renormalised over the chosen."""
    router, bias_E = gpt_oss(), BIASES[bias].double()
    router.bias.data.copy_(bias_E)

    def score(call):
        return Softmax(E)(replace(call, x_TD=call.x_TD + bias_E))

    check(router, AWKWARD[name].double(), score, TopK(E))
