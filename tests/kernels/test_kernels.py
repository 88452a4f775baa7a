import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from equipoise.kernels import KERNELS
from equipoise.kernels.swiglu import swiglu, swiglu_backward

# One table: relative to the largest entry of the result, by dtype and operator. In half precision an outer product
# differs by a few units, since naive rounds after every row; swiglu, since each of its steps rounds.
TOLERANCE = {
    (torch.float64, "linear"): 1e-15,
    (torch.float64, "outer"): 1e-15,
    (torch.float64, "swiglu"): 1e-14,
    (torch.float32, "linear"): 1e-6,
    (torch.float32, "outer"): 1e-6,
    (torch.float32, "swiglu"): 2e-6,
    (torch.bfloat16, "linear"): 8e-3,
    (torch.bfloat16, "outer"): 3e-2,
    (torch.bfloat16, "swiglu"): 3e-2,
}
LOADS = {
    "uneven": [3, 7, 1, 5],
    "empty_first_middle_last": [0, 6, 0, 4, 0],
    "all_to_one": [0, 0, 11, 0],
    "no_rows": [0, 0, 0],
    "one_expert": [13],
    "one_row": [0, 1, 0],
}
KERNEL_DTYPES = [
    ("loop", torch.float64),
    ("loop", torch.float32),
    ("loop", torch.bfloat16),
    ("grouped_mm", torch.float32),
    ("grouped_mm", torch.bfloat16),
]
WIDTHS = {"naive": (7, 5), "loop": (7, 5), "grouped_mm": (16, 8)}
every_kernel = pytest.mark.parametrize(("kernel", "dtype"), KERNEL_DTYPES)
every_load = pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
with_unused = pytest.mark.parametrize("unused", [0, 3])


def check_close(ours, expected, operator):
    scale = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE[ours.dtype, operator] * scale)


def rows_of(load, unused, width, dtype):
    """Rows of which those that belong to no expert are NaN."""
    x_NI = torch.randn(sum(load) + unused, width).to(dtype)
    x_NI[sum(load) :] = torch.nan
    return x_NI


def problem(load, unused, widths, dtype, num_tokens=17):
    """The arguments of ``swiglu`` and an upstream gradient; unused rows point at token 0, which is NaN everywhere."""
    dim, hidden = widths
    num_rows = sum(load)
    token_N = torch.cat([torch.randint(1, num_tokens, (num_rows,)), torch.zeros(unused, dtype=torch.int64)])
    weight_N = torch.rand(num_rows + unused, dtype=torch.promote_types(dtype, torch.float32))
    weight_N[num_rows:] = 0
    x_TD, grad_TD = torch.randn(num_tokens, dim).to(dtype), torch.randn(num_tokens, dim).to(dtype)
    x_TD[0], grad_TD[0] = torch.nan, torch.nan
    gate_up, down = torch.randn(len(load), 2 * hidden, dim).to(dtype), torch.randn(len(load), dim, hidden).to(dtype)
    return (x_TD, token_N, weight_N, gate_up, down, torch.tensor(load).cumsum(0)), grad_TD


def output_and_gradients(arguments, grad_TD, kernel):
    x_TD, token_N, weight_N, gate_up, down, end_E = arguments
    x_TD, weight_N, gate_up, down = (tensor.detach().requires_grad_() for tensor in (x_TD, weight_N, gate_up, down))
    y_TD, *_ = swiglu(x_TD, token_N, weight_N, gate_up, down, end_E, kernel)
    y_TD.backward(grad_TD)
    return {"y": y_TD.detach(), "x": x_TD.grad, "weight": weight_N.grad, "gate_up": gate_up.grad, "down": down.grad}


def by_autograd(arguments, grad_TD):
    """The same, expert by expert, with torch's own derivatives."""
    x_TD, token_N, weight_N, gate_up, down, end_E = (tensor.clone() for tensor in arguments)
    for tensor in (x_TD, weight_N, gate_up, down):
        tensor.requires_grad_()
    y_TD, start = torch.zeros_like(x_TD), 0
    for expert, end in enumerate(end_E.tolist()):
        rows = slice(start, end)
        gate_NF, up_NF = F.linear(x_TD[token_N[rows]], gate_up[expert]).chunk(2, 1)
        y_ND = F.linear(F.silu(gate_NF) * up_NF, down[expert]) * weight_N[rows, None]
        y_TD, start = y_TD.index_add(0, token_N[rows], y_ND), end
    y_TD.backward(grad_TD)
    return {"y": y_TD.detach(), "x": x_TD.grad, "weight": weight_N.grad, "gate_up": gate_up.grad, "down": down.grad}


@every_load
@with_unused
def test_naive_is_a_matrix_product_per_expert(load, unused):
    x_NI, y_NO = rows_of(load, unused, 7, torch.float64), rows_of(load, unused, 5, torch.float64)
    weight_EOI, end_E = torch.randn(len(load), 5, 7, dtype=torch.float64), torch.tensor(load).cumsum(0)
    linear_NO = KERNELS["naive"].linear(x_NI, weight_EOI, end_E)
    outer_EOI, start = KERNELS["naive"].outer(y_NO, x_NI, end_E), 0
    for expert, end in enumerate(end_E.tolist()):
        torch.testing.assert_close(linear_NO[start:end], x_NI[start:end] @ weight_EOI[expert].T)
        torch.testing.assert_close(outer_EOI[expert], y_NO[start:end].T @ x_NI[start:end])
        start = end
    assert linear_NO[start:].eq(0).all()


@every_kernel
@every_load
@with_unused
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_naives_and_unused_rows_spread_nowhere(kernel, dtype, load, unused, transposed):
    inner, outer = WIDTHS[kernel]
    x_NI, y_NO = rows_of(load, unused, inner, dtype), rows_of(load, unused, outer, dtype)
    weight_EOI, end_E = torch.randn(len(load), outer, inner).to(dtype), torch.tensor(load).cumsum(0)
    if transposed:
        weight_EOI = weight_EOI.mT.contiguous().mT
    ours, naive = KERNELS[kernel], KERNELS["naive"]
    linear_NO, outer_EOI = ours.linear(x_NI, weight_EOI, end_E), ours.outer(y_NO, x_NI, end_E)
    check_close(linear_NO, naive.linear(x_NI, weight_EOI, end_E), "linear")
    check_close(outer_EOI, naive.outer(y_NO, x_NI, end_E), "outer")
    assert linear_NO[sum(load) :].eq(0).all()
    assert outer_EOI[torch.tensor(load) == 0].eq(0).all()


@pytest.mark.parametrize("widths", [(1, 1), (1, 8), (17, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loop_takes_odd_widths(widths, dtype):
    arguments, grad_TD = problem([3, 0, 7], 2, widths, dtype)
    expected = output_and_gradients(arguments, grad_TD, "naive")
    for name, ours in output_and_gradients(arguments, grad_TD, "loop").items():
        check_close(
            ours[1:] if name in "yx" else ours, expected[name][1:] if name in "yx" else expected[name], "swiglu"
        )


@every_load
@with_unused
def test_swiglu_over_naive_has_torchs_own_derivatives(load, unused):
    arguments, grad_TD = problem(load, unused, (7, 5), torch.float64)
    expected = by_autograd(arguments, grad_TD)
    for name, ours in output_and_gradients(arguments, grad_TD, "naive").items():
        torch.testing.assert_close(
            ours, expected[name], rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )


@every_kernel
@every_load
@with_unused
def test_swiglu_over_any_kernel_is_swiglu_over_naive(kernel, dtype, load, unused):
    arguments, grad_TD = problem(load, unused, WIDTHS[kernel], dtype)
    expected = output_and_gradients(arguments, grad_TD, "naive")
    ours = output_and_gradients(arguments, grad_TD, kernel)
    for name, mine in ours.items():
        check_close(mine, expected[name], "swiglu")
    assert all(ours[name][0].eq(0).all() for name in ("y", "x")), "the token that only unused rows point at"
    assert ours["weight"][sum(load) :].eq(0).all()
    assert all(ours[name][torch.tensor(load) == 0].eq(0).all() for name in ("gate_up", "down"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("strided", ["expanded_gradient", "gradient", "tokens", "gate_up", "down"])
def test_strides_do_not_matter(kernel, strided):
    arguments, grad_TD = problem([3, 0, 7], 0, (16, 8), torch.float32)
    x_TD, token_N, weight_N, gate_up, down, end_E = (tensor.nan_to_num(0) for tensor in arguments)
    grad_TD = torch.ones(()).expand_as(grad_TD) if strided == "expanded_gradient" else grad_TD.nan_to_num(0)
    expected = output_and_gradients((x_TD, token_N, weight_N, gate_up, down, end_E), grad_TD.contiguous(), "naive")
    if strided == "gradient":
        grad_TD = grad_TD.T.contiguous().T
    elif strided == "tokens":
        x_TD = x_TD.T.contiguous().T
    elif strided == "gate_up":
        gate_up = gate_up.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    elif strided == "down":
        down = down.mT.contiguous().mT
    ours = output_and_gradients((x_TD, token_N, weight_N, gate_up, down, end_E), grad_TD, kernel)
    for name, mine in ours.items():
        check_close(mine, expected[name], "swiglu")


@pytest.mark.parametrize("kernel", ["naive", "loop"])
def test_gradcheck(kernel):
    (x_TD, token_N, weight_N, gate_up, down, end_E), _ = problem([2, 0, 3], 0, (3, 2), torch.float64, num_tokens=4)
    x_TD[0] = 1.0

    def forward(x_TD, weight_N, gate_up, down):
        return swiglu(x_TD, token_N, weight_N, gate_up, down, end_E, kernel)[0]

    assert torch.autograd.gradcheck(forward, [tensor.requires_grad_() for tensor in (x_TD, weight_N, gate_up, down)])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("trained", [{"x"}, {"weight"}, {"gate_up"}, {"down"}, {"gate_up", "down"}])
def test_frozen_inputs_get_no_gradient_and_change_no_other(kernel, trained):
    arguments, grad_TD = problem([3, 0, 7], 2, (16, 8), torch.float32)
    expected = output_and_gradients(arguments, grad_TD, "naive")
    x_TD, token_N, weight_N, gate_up, down, end_E = arguments
    tensors = {"x": x_TD, "weight": weight_N, "gate_up": gate_up, "down": down}
    for name in trained:
        tensors[name].requires_grad_()
    swiglu(x_TD, token_N, weight_N, gate_up, down, end_E, kernel)[0].backward(grad_TD)
    for name, tensor in tensors.items():
        if name in trained:
            check_close(tensor.grad, expected[name], "swiglu")
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tensors", ["meta", "fake"])
def test_shapes_and_dtypes_are_known_without_data(kernel, dtype, tensors):
    mode = FakeTensorMode()
    arguments = [
        t.to("meta") if tensors == "meta" else mode.from_tensor(t) for t in problem([3, 7], 2, (16, 8), dtype)[0]
    ]
    for index in (0, 2, 3, 4):
        arguments[index].requires_grad_()
    y_TD, *_ = swiglu(*arguments, kernel)
    y_TD.sum().backward()
    assert (y_TD.shape, y_TD.dtype) == ((17, 16), dtype)
    for index in (0, 2, 3, 4):
        assert (arguments[index].grad.shape, arguments[index].grad.dtype) == (
            arguments[index].shape,
            arguments[index].dtype,
        )


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_operators_keep_their_contract_with_torch(kernel):
    arguments, _ = problem([3, 0, 7], 0, (16, 8), torch.float32)
    x_TD, token_N, weight_N, gate_up, down, end_E = (tensor.nan_to_num(0) for tensor in arguments)
    saved = [tensor.detach() for tensor in swiglu(x_TD, token_N, weight_N, gate_up, down, end_E, kernel)[1:]]
    for needs_weights in (True, False):
        rest = (token_N, weight_N, gate_up, down, end_E, kernel, needs_weights)
        torch.library.opcheck(swiglu_backward, (torch.randn(17, 16), saved, *rest))
    for tensor in (x_TD, weight_N, gate_up, down):
        tensor.requires_grad_()
    torch.library.opcheck(swiglu, (x_TD, token_N, weight_N, gate_up, down, end_E, kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_combine_weights_gradient_is_not_rounded_to_half_precision(kernel):
    arguments, grad_TD = problem([3, 0, 7], 0, (16, 8), torch.bfloat16)
    gradient_N = output_and_gradients(arguments, grad_TD, kernel)["weight"]
    assert not torch.equal(gradient_N, gradient_N.bfloat16().float())


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_inputs_give_equal_bits(kernel):
    arguments, grad_TD = problem([3, 0, 7], 2, (16, 8), torch.float32)
    first, second = (output_and_gradients(arguments, grad_TD, kernel) for _ in range(2))
    assert all(torch.equal(first[name].nan_to_num(7), second[name].nan_to_num(7)) for name in first)
