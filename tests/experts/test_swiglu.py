import math

import pytest
import torch

from equipoise.contracts import Routing
from equipoise.experts.swiglu import DenseSwiGLU, SwiGLU
from equipoise.routing.top_k import TopK
from hand_made import call_of, scores_of

T, D, F, E, K = 11, 8, 4, 5, 2
KERNELS = ["naive", "loop", "grouped_mm"]


def routing_of(gate_TE, k=K, **settings):
    return TopK(gate_TE.shape[1], **settings)(call_of(gate_TE.detach(), k), scores_of(gate_TE))


def silu(value):
    return value / (1 + math.exp(-value))


def by_loops(experts, x_TD, routing):
    """Row by row in Python floats; the gate's rows come first in ``gate_up``."""
    gate_up, down, y = experts.gate_up.tolist(), experts.down.tolist(), [[0.0] * D for _ in x_TD]
    rows = zip(routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N.tolist())
    for t, e, weight in rows:
        if e == len(routing.load_E):
            continue
        projected = [math.fsum(a * b for a, b in zip(row, x_TD[t].tolist())) for row in gate_up[e]]
        hidden = [silu(gate) * up for gate, up in zip(projected[:F], projected[F:])]
        for d in range(D):
            y[t][d] += weight * math.fsum(a * b for a, b in zip(down[e][d], hidden))
    return torch.tensor(y, dtype=torch.float64)


@pytest.mark.parametrize("settings", [{}, {"renormalize": False}, {"capacity_factor": 0.5}])
@pytest.mark.parametrize("kernel", ["naive", "loop"])
def test_it_is_the_weighted_sum_of_each_tokens_experts(kernel, settings):
    experts, x_TD = SwiGLU(D, F, E, kernel).double(), torch.randn(T, D, dtype=torch.float64)
    routing = routing_of(torch.rand(T, E, dtype=torch.float64), **settings)
    torch.testing.assert_close(
        experts(x_TD, routing).detach(), by_loops(experts, x_TD, routing), rtol=1e-12, atol=1e-13
    )
    assert experts.kernel_used == kernel


def test_gradcheck_of_tokens_weights_and_both_parameters():
    experts, gate_TE = SwiGLU(3, 2, 3, "loop").double(), torch.rand(4, 3, dtype=torch.float64)
    routing, x_TD = routing_of(gate_TE), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def forward(x_TD, weight_N, gate_up, down):
        moved = Routing(routing.token_N, routing.expert_N, weight_N, routing.load_E, routing.dropped_E)
        return torch.func.functional_call(experts, {"gate_up": gate_up, "down": down}, (x_TD, moved))

    weight_N = routing.weight_N.clone().requires_grad_()
    assert torch.autograd.gradcheck(forward, (x_TD, weight_N, experts.gate_up, experts.down))


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_expert_without_rows_gets_a_gradient_of_exactly_zero(kernel):
    experts, gate_TE = SwiGLU(D, F, E, kernel), torch.rand(T, E)
    gate_TE[:, [0, 3]] = -1
    experts(torch.randn(T, D), routing_of(gate_TE)).sum().backward()
    for parameter in experts.parameters():
        used = parameter.grad.flatten(1).abs().sum(1) > 0
        assert used.tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_without_use_give_nothing_and_get_nothing(kernel):
    experts, x_TD = SwiGLU(D, F, E, kernel), torch.randn(T, D, requires_grad=True)
    gate_TE = torch.rand(T, E)
    mask_T = torch.arange(T) != 4
    routing = TopK(E)(call_of(gate_TE, K, mask_T), scores_of(gate_TE))
    y_TD = experts(x_TD, routing)
    y_TD.square().sum().backward()
    assert y_TD[4].eq(0).all()
    assert x_TD.grad[4].eq(0).all()
    assert (x_TD.grad[mask_T].abs().sum(1) > 0).all()


@pytest.mark.parametrize("kernel", ["auto", "loop", "naive", "grouped_mm"])
def test_autocast_computes_in_bf16_and_keeps_gradients_in_fp32(kernel):
    experts, x_TD, routing = SwiGLU(D, F * 2, E, kernel), torch.randn(T, D), routing_of(torch.rand(T, E))
    exact = experts(x_TD, routing)
    with torch.autocast("cpu", torch.bfloat16):
        y_TD = experts(x_TD, routing)
    y_TD.sum().backward()
    assert y_TD.dtype == torch.bfloat16
    assert experts.gate_up.grad.dtype == torch.float32
    torch.testing.assert_close(y_TD.float(), exact, rtol=0, atol=3e-2 * exact.abs().max().item())
    assert experts.kernel_used == ("grouped_mm" if kernel == "auto" else kernel)


def test_auto_records_what_it_chose():
    routing = routing_of(torch.rand(T, E))
    experts = SwiGLU(D, F, E)
    assert experts.kernel_used is None
    experts(torch.randn(T, D), routing)
    assert experts.kernel_used == "grouped_mm"
    odd = SwiGLU(7, F, E)
    odd(torch.randn(T, 7), routing)
    assert odd.kernel_used == "loop"


def test_outputs_start_at_about_the_size_of_the_input():
    routing = routing_of(torch.rand(101, 3), k=1, renormalize=False)
    experts = SwiGLU(256, 128, 3)
    ones = Routing(
        routing.token_N, routing.expert_N, torch.ones_like(routing.weight_N), routing.load_E, routing.dropped_E
    )
    assert 0.2 < experts(torch.randn(101, 256), ones).std().item() < 1.5


def test_the_dense_form_is_one_expert():
    dense, x = DenseSwiGLU(D, F).double(), torch.randn(2, 3, D, dtype=torch.float64)
    one = SwiGLU(D, F, 1, "loop").double()
    one.gate_up.data[0], one.down.data[0] = dense.gate_up.weight.data, dense.down.weight.data
    routing = routing_of(torch.ones(6, 1, dtype=torch.float64), k=1)
    torch.testing.assert_close(dense(x).flatten(0, 1), one(x.flatten(0, 1), routing), rtol=1e-12, atol=0)
