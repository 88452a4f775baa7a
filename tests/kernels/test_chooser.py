import pytest
import torch

from equipoise import UserError
from equipoise.kernels import KERNELS
from equipoise.kernels.chooser import choose, refuse_unknown


@pytest.mark.parametrize(
    ("dtype", "widths", "expected"),
    [
        (torch.float32, (16, 8, 4), "grouped_mm"),
        (torch.float32, (16, 8, 6), "loop"),
        (torch.float32, (16, 7), "loop"),
        (torch.bfloat16, (16, 8), "grouped_mm"),
        (torch.bfloat16, (16, 12), "loop"),
        (torch.float16, (24,), "grouped_mm"),
        (torch.float16, (20,), "loop"),
        (torch.float64, (16, 8), "loop"),
    ],
)
def test_auto_takes_grouped_mm_where_torch_does(dtype, widths, expected):
    assert choose("auto", dtype, widths) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(4, 8), (8, 4), (8, 8), (8, 12), (16, 24)])
def test_whatever_auto_chooses_runs_forward_and_backward(dtype, widths):
    inner, outer = widths
    kernel = KERNELS[choose("auto", dtype, widths)]
    x_NI, y_NO, end_E = torch.randn(5, inner).to(dtype), torch.randn(5, outer).to(dtype), torch.tensor([3, 5])
    weight_EOI = torch.randn(2, outer, inner).to(dtype)
    torch.testing.assert_close(kernel.linear(x_NI, weight_EOI, end_E)[3:], x_NI[3:] @ weight_EOI[1].T)
    torch.testing.assert_close(kernel.linear(y_NO, weight_EOI.mT, end_E)[3:], y_NO[3:] @ weight_EOI[1])
    torch.testing.assert_close(kernel.outer(y_NO, x_NI, end_E)[1], y_NO[3:].T @ x_NI[3:])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_was_asked_for_is_used(kernel):
    assert choose(kernel, torch.float32, (16, 8)) == kernel


@pytest.mark.parametrize("kernel", ["naive", "loop"])
def test_the_others_take_everything(kernel):
    assert choose(kernel, torch.float64, (7, 1)) == kernel


def test_an_unknown_kernel_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"'triton'.*auto, naive, loop, grouped_mm"):
        refuse_unknown("triton")


@pytest.mark.parametrize(
    ("dtype", "widths", "reason"),
    [(torch.float64, (16,), "float64"), (torch.float32, (16, 7), r"16 bytes.*\(16, 7\)")],
)
def test_a_kernel_that_cannot_do_it_is_refused_not_replaced(dtype, widths, reason):
    with pytest.raises(UserError, match=reason + r".*choose kernel='loop' or 'auto'"):
        choose("grouped_mm", dtype, widths)
