import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from equipoise import LoadStats, MoE
from equipoise.balancing.bias import Bias
from equipoise.errors import UserError
from equipoise.routing.centroid import Centroid
from equipoise.routing.top_k import TopK
from hand_made import attach_still, call_of, dense

D, E, K = 7, 5, 2
SIZES = {"dim": D, "hidden_dim": 3, "num_experts": E, "top_k": K, "method": "kmeans"}


def layer_of(seed=0, **settings):
    torch.manual_seed(seed)
    return MoE(**{**SIZES, **settings}).double()


def steps(layer, *batches):
    handle, optimizer = attach_still(layer)
    for batch in batches:
        for x in batch:
            handle.follow(layer(x).square().mean()).backward()
        optimizer.step()
    handle.remove()
    return layer


def unit(row):
    return row / math.sqrt(math.fsum(v * v for v in row.tolist()))


def test_scores_are_cosines_and_gates_a_softmax_over_those_that_are_chosen():
    layer, x_TD = layer_of(temperature=0.3), torch.randn(11, D).double() * 10
    call = layer.call(x_TD, None)
    scores = layer.scorer(call)
    cosine_TE = torch.tensor([[float(unit(x) @ unit(c.double())) for c in layer.router.weight] for x in x_TD])
    torch.testing.assert_close(scores.logit_TE, cosine_TE.double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(scores.choice_TE, scores.logit_TE)
    weight_TE, chosen_TE = dense(layer.selector(call, scores), 11)
    for weights, chosen, cosines in zip(weight_TE, chosen_TE, scores.logit_TE):
        assert set(chosen.nonzero()[:, 0].tolist()) == set(cosines.topk(K).indices.tolist())
        torch.testing.assert_close(weights[chosen], (cosines[chosen] / 0.3).softmax(0), rtol=1e-9, atol=0)


def test_a_step_is_the_running_mean_of_unit_tokens_in_plain_loops():
    layer = layer_of(ema=0.9)
    before, batch = layer.router.weight.double().clone(), [torch.randn(6, D).double(), torch.randn(3, D).double() * 9]
    bias_E = torch.tensor([0.0, 0.0, 0.0, 0.0, -9.0])  # one expert gets nothing
    layer.balancers["bias"].bias_E.copy_(bias_E)
    tokens = {e: [] for e in range(E)}
    for x in torch.cat(batch):
        cosines = torch.stack([unit(x) @ unit(c) for c in before]) + bias_E
        for e in cosines.topk(K).indices.tolist():
            tokens[e].append(unit(x))
    steps(layer, batch)
    for e, mine in tokens.items():
        expected = 0.9 * before[e] + 0.1 * sum(mine) / len(mine) if mine else before[e]
        torch.testing.assert_close(layer.router.weight[e].double(), expected, rtol=1e-5, atol=1e-7)
    assert tokens[4] == []
    assert [len(mine) > 0 for mine in tokens.values()].count(True) >= 3


def test_centring_takes_the_running_mean_off_and_follows_it():
    layer, x_TD = layer_of(subtract_mean=True, ema=0.5), torch.randn(11, D).double() + 5
    mean_D = torch.stack([unit(x) for x in x_TD]).mean(0)
    assert not layer.router.mean_D.any()
    steps(layer, [x_TD])
    torch.testing.assert_close(layer.router.mean_D.double(), 0.5 * mean_D, rtol=1e-5, atol=1e-7)
    off = layer.router.mean_D.double()
    expected = torch.tensor(
        [[float(unit(unit(x) - off) @ unit(c.double())) for c in layer.router.weight] for x in x_TD]
    )
    torch.testing.assert_close(layer.router(x_TD), expected.double(), rtol=1e-5, atol=1e-6)
    assert "mean_D" not in dict(layer_of().router.named_buffers())


def test_padding_is_in_no_mean():
    one, other = layer_of(subtract_mean=True), layer_of(subtract_mean=True)
    x, mask = torch.randn(1, 9, D).double() + 1, torch.arange(9)[None] % 3 > 0
    handle, optimizer = attach_still(one)
    handle.follow(one(x, mask).square().mean()).backward()
    optimizer.step()
    steps(other, [x[mask]])
    assert torch.equal(one.router.mean_D, other.router.mean_D)
    assert torch.equal(one.router.weight, other.router.weight)


def test_rotating_tokens_and_centroids_together_changes_no_score_and_rotates_the_step():
    rotation = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(2)).double()).Q
    one, other, x_TD = layer_of(), layer_of(), torch.randn(11, D).double()
    with torch.no_grad():
        other.router.weight.copy_(one.router.weight.double() @ rotation.T)
    torch.testing.assert_close(other.router(x_TD @ rotation.T), one.router(x_TD), rtol=0, atol=1e-6)
    torch.testing.assert_close(one.router(1e3 * x_TD), one.router(x_TD), rtol=1e-9, atol=1e-12)
    steps(one, [x_TD]), steps(other, [x_TD @ rotation.T])
    torch.testing.assert_close(other.router.weight.double(), one.router.weight.double() @ rotation.T, rtol=0, atol=1e-6)


def test_it_starts_from_different_directions_of_length_one():
    weight = layer_of().router.weight
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(E), rtol=1e-6, atol=0)
    cosine_EE = weight @ weight.T - torch.eye(E)
    assert cosine_EE.abs().max() < 0.95
    assert not list(layer_of().router.parameters())


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", 0.0), ("temperature", -1.0), ("temperature", float("inf")), ("ema", 1.0), ("ema", -0.1)],
)
def test_impossible_settings_are_refused(setting, value):
    with pytest.raises(UserError, match=f"centroid.{setting}"):
        Centroid(E, **{setting: value})


# Synthetic clusters: what balances is the bias; a mean that all tokens have unbalances, and must be taken off.


def clusters(num_clusters, dim, common):
    """Draws ``[T, D]`` around directions of length 3, all moved by one vector of length ``common``."""
    generator = torch.Generator().manual_seed(0)
    middle_CD = 3 * nn.functional.normalize(torch.randn(num_clusters, dim, generator=generator), dim=1)
    mean_D = common * nn.functional.normalize(torch.randn(dim, generator=generator), dim=0)

    def draw(num_tokens):
        which_T = torch.randint(num_clusters, (num_tokens,), generator=generator)
        return middle_CD[which_T] + mean_D + torch.randn(num_tokens, dim, generator=generator)

    return draw


def settled(rate, num_experts=16, num_tokens=1024, **settings):
    """The balance after 150 steps of 16 experts on 8 clusters with a common mean."""
    torch.manual_seed(0)
    scorer, bias, selector = Centroid(num_experts, ema=0.9, **settings), Bias(num_experts, rate=rate), TopK(num_experts)
    router, draw = scorer.make_router(16), clusters(8, 16, common=6.0)
    for _ in range(150):
        call = replace(call_of(draw(num_tokens), 2), num_experts=num_experts, router=router)
        scores = scorer(call)
        routing = selector(call, bias.adjust(call, scores))
        router.update(router.statistics(call, scores, routing))
        bias.update(bias.statistics(call, scores, routing))
    return LoadStats.of(routing.load_E)


def test_on_clusters_with_a_common_mean_the_bias_balances_and_so_does_taking_the_mean_off():
    alone, with_bias, without_mean = settled(0.0), settled(4e-3), settled(0.0, subtract_mean=True)
    assert (alone.max_vio > 0.7, alone.dead) == (True, 1)
    assert (with_bias.max_vio < 0.25, with_bias.dead) == (True, 0)
    assert (without_mean.max_vio < 0.25, without_mean.dead) == (True, 0)
