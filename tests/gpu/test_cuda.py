"""The layer on a CUDA device: kernels against the CPU's oracle, and the tap's counts. Runs in ``make test-gpu``."""

import pytest
import torch

import equipoise as eq
from equipoise.kernels import KERNELS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float64: 1e-10}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", ["loop", "grouped_mm"])
def test_kernels_equal_the_oracle_and_leave_rows_without_use_zero(kernel: str, dtype: torch.dtype) -> None:
    if kernel == "grouped_mm" and dtype == torch.float64:
        pytest.skip("grouped_mm does not take fp64; chooser refuses it")
    load_E = torch.tensor([5, 0, 17, 1])
    x, weight = torch.randn(29, 32, dtype=torch.float64), torch.randn(4, 48, 32, dtype=torch.float64)
    x[23:] = torch.nan
    expected = KERNELS["naive"].linear(x, weight, load_E.cumsum(0))
    found = KERNELS[kernel].linear(x.to("cuda", dtype), weight.to("cuda", dtype), load_E.cumsum(0).cuda())
    assert torch.equal(found[23:], torch.zeros_like(found[23:]))
    torch.testing.assert_close(
        found[:23].double().cpu(), expected[:23], rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype]
    )


@pytest.mark.parametrize("method", eq.METHODS)
def test_a_step_on_the_device_equals_the_step_on_the_cpu(method: str) -> None:
    settings = {"evaluation": "top_k"} if method == "expert_choice" else {}
    sizes = {"dim": 32, "hidden_dim": 48, "num_experts": 8, "top_k": 2, "method": method, "kernel": "loop"}
    states = []
    x = torch.randn(3, 17, 32, dtype=torch.float64)
    mask = torch.rand(3, 17) > 0.2
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        layer = eq.MoE(**sizes, **settings).double().to(device)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        handle = eq.attach(layer, optimizer)
        for _ in range(3):
            handle.follow(layer(x.to(device), mask.to(device)).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append((layer.state_dict(), eq.load_stats(layer)[""].load))
    (cpu, cpu_load), (cuda, cuda_load) = states
    assert torch.equal(cpu_load, cuda_load.cpu())
    for name, value in cpu.items():
        torch.testing.assert_close(cuda[name].cpu(), value, rtol=1e-9, atol=1e-9, msg=name)
