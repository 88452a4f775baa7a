import pytest
import torch
from torch import nn

from equipoise.precision import FixedPrecision


class Counting(FixedPrecision):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("state", torch.tensor([1.001, 2.0, 1e30]))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("nothing", None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_buffers_keep_their_bits_and_parameters_follow(dtype):
    module = nn.Sequential(Counting()).to(dtype)[0]
    assert module.weight.dtype == dtype
    assert torch.equal(module.state, torch.tensor([1.001, 2.0, 1e30]))
    assert module.state.dtype == torch.float32
    assert (module.count, module.nothing) == (7, None)


def test_buffers_move():
    module = Counting().to(device="meta", dtype=torch.bfloat16)
    assert (module.state.device.type, module.state.dtype) == ("meta", torch.float32)
