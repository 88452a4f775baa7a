import torch

from equipoise import MoE
from equipoise.routing.active import Active
from equipoise.routing.relu import Relu
from hand_made import call_of, check_order, dense

E = 5


def route(logit_TE, **changes):
    call = call_of(logit_TE, 2, **changes)
    return Active(E)(call, Relu(E)(call))


def test_every_positive_score_is_a_row_and_its_own_weight():
    logit_TE = torch.randn(13, E).round(decimals=1)
    logit_TE[3], logit_TE[4], logit_TE[5, 2] = -1.0, 2.0, 0.0  # none, all, and one on the edge
    routing = route(logit_TE)
    check_order(routing)
    weight_TE, chosen_TE = dense(routing, 13)
    assert torch.equal(chosen_TE, logit_TE > 0)
    assert torch.equal(weight_TE, logit_TE.clamp(min=0))
    assert routing.load_E.tolist() == [int((column > 0).sum()) for column in logit_TE.T]
    assert len(routing.token_N) == 13 * E == Active(E).num_rows(13, E, 2)


def test_padding_and_no_tokens_have_no_rows():
    logit_TE, mask_T = torch.randn(7, E), torch.tensor([1, 1, 0, 1, 0, 0, 1]).bool()
    assert torch.equal(dense(route(logit_TE, mask_T=mask_T), 7)[1], (logit_TE > 0) & mask_T[:, None])
    assert route(torch.zeros(0, E)).load_E.tolist() == [0] * E


def test_evaluation_routes_alike():
    logit_TE = torch.randn(7, E)
    assert torch.equal(route(logit_TE, training=False).expert_N, route(logit_TE).expert_N)


def test_the_layer_is_the_dense_sum_and_its_gradient_is_that_of_the_sum():
    """Fully differentiable: nothing is chosen that a product with relu would not choose."""
    torch.manual_seed(0)
    layer = MoE(dim=7, hidden_dim=3, num_experts=E, top_k=2, method="relu").double()
    x_TD = torch.randn(11, 7, dtype=torch.float64)
    expected_TD = torch.zeros_like(x_TD)
    for e in range(E):
        gate, up = (x_TD @ layer.experts.gate_up[e].T).chunk(2, dim=1)
        answer_TD = (torch.nn.functional.silu(gate) * up) @ layer.experts.down[e].T
        expected_TD = expected_TD + (x_TD @ layer.router.weight[e]).clamp(min=0)[:, None] * answer_TD
    y_TD = layer.eval()(x_TD)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-9, atol=1e-12)
    (expected,) = torch.autograd.grad(expected_TD.square().sum(), layer.router.weight)
    (found,) = torch.autograd.grad(y_TD.square().sum(), layer.router.weight)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
