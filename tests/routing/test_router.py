import math

import pytest
import torch

from equipoise.routing.router import Router

T, D, E = 5, 7, 3


def test_logits_are_dot_products():
    router = Router(D, E).double()
    x_TD = torch.randn(T, D, dtype=torch.float64)
    rows, weights = x_TD.tolist(), router.weight.tolist()
    expected = [[math.fsum(a * b for a, b in zip(row, weight)) for weight in weights] for row in rows]
    torch.testing.assert_close(router(x_TD), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_fp32_whatever_the_model_is_kept_in(x_dtype, weight_dtype, autocast):
    router = Router(D, E).to(weight_dtype)
    x_TD = torch.randn(T, D).to(x_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logit_TE = router(x_TD)
    assert torch.equal(logit_TE, x_TD.float() @ router.weight.float().T)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64])
def test_fp64_tokens_get_fp64_logits(weight_dtype):
    router, x_TD = Router(D, E).to(weight_dtype), torch.randn(T, D, dtype=torch.float64)
    assert torch.equal(router(x_TD), x_TD @ router.weight.double().T)


def test_gradients_are_the_closed_form():
    router, x_TD = Router(D, E).bfloat16(), torch.randn(T, D)
    grad_TE = torch.randn(T, E)
    router(x_TD).backward(grad_TE)
    torch.testing.assert_close(router.weight.grad, (grad_TE.T @ x_TD).bfloat16())


def test_it_starts_with_logits_of_about_unit_size():
    logit_TE = Router(1009, 61)(torch.randn(101, 1009))
    assert logit_TE.std().item() == pytest.approx(1, abs=0.05)


def test_the_weight_is_its_only_parameter():
    assert [name for name, _ in Router(D, E).named_parameters()] == ["weight"]
