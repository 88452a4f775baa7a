import pytest
import torch

from equipoise import MoE
from equipoise.contracts import Scores
from equipoise.routing.assignment import assign
from equipoise.routing.base import Base
from equipoise.routing.top_k import TopK
from hand_made import call_of, check_order, dense


def scored(logit_TE):
    gate_TE = logit_TE.sigmoid()
    return Scores(logit_TE, gate_TE / gate_TE.sum(1, keepdim=True), gate_TE, gate_TE)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_get_the_best_assignment_and_weigh_their_sigmoid(k, masked):
    logit_TE = torch.randn(23, 5).double()
    mask_T = torch.arange(23) % 3 > 0 if masked else None
    real_T = torch.ones(23, dtype=torch.bool) if mask_T is None else mask_T
    routing = Base(5)(call_of(logit_TE, k, mask_T), scored(logit_TE))
    check_order(routing)
    weight_TE, chosen_TE = dense(routing, 23)
    expected_TE = torch.zeros(23, 5, dtype=torch.bool)
    expected_TE[real_T] = torch.from_numpy(assign(logit_TE[real_T].numpy(), k))
    assert torch.equal(chosen_TE, expected_TE)
    torch.testing.assert_close(weight_TE, logit_TE.sigmoid() * expected_TE)


def test_it_is_the_logits_total_that_is_best():
    """Not that of the sigmoids, which would have it the other way round."""
    logit_TE = torch.tensor([[4.0, 1.0], [9.0, 5.9]]).double()
    straight, crossed = logit_TE.diagonal(), logit_TE.flip(1).diagonal()
    assert crossed.sum() > straight.sum()
    assert crossed.sigmoid().sum() < straight.sigmoid().sum()
    _, chosen_TE = dense(Base(2)(call_of(logit_TE, 1), scored(logit_TE)), 2)
    assert chosen_TE.tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("k", [1, 2])
def test_evaluation_is_greedy(k):
    logit_TE = torch.randn(23, 5) + 3 * torch.randn(5)
    call, scores = call_of(logit_TE, k, training=False), scored(logit_TE)
    routing, greedy = Base(5)(call, scores), TopK(5, renormalize=False)(call, scores)
    for actual, expected in zip(dense(routing, 23), dense(greedy, 23)):
        assert torch.equal(actual, expected)


def test_a_layer_trains_with_equal_loads():
    layer = MoE(dim=7, hidden_dim=5, num_experts=5, top_k=1, method="base", kernel="loop")
    with torch.no_grad():
        layer.router.weight[1] += 3.0
    x = torch.randn(2, 20, 7)
    layer(x).square().mean().backward()
    assert layer.routing.load_E.tolist() == [8] * 5
    assert layer.router.weight.grad.abs().amax(1).min() > 0
    layer.eval()(x)
    assert layer.routing.load_E.max() > 10


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_still_find_an_end(bad):
    """Compiled, and on a GPU, nobody refuses them before; the layer's ``logit_total`` tells."""
    logit_TE = torch.randn(32, 8)
    logit_TE[5] = bad
    assert Base(8)(call_of(logit_TE, 2), scored(logit_TE)).load_E.tolist() == [8] * 8
