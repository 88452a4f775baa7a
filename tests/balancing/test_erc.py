from dataclasses import replace

import pytest
import torch
from torch import nn

import equipoise.balancing.erc as erc
from equipoise import MoE, UserError, load_stats
from equipoise.balancing.erc import Erc, answers, coupling
from equipoise.experts.swiglu import SwiGLU
from hand_made import attach_still, call_of, routing_of, scores_of

E, D, F = 5, 7, 3


def by_loop(router_ED, gate_EFD, alpha):
    """The paper's double sum."""
    count, total = len(router_ED), 0.0
    answer = [[sum((w @ row) ** 2 for w in gate) ** 0.5 for gate in gate_EFD] for row in router_ED]
    for i in range(count):
        for j in range(count):
            if j != i:
                total += max(0.0, answer[i][j] - alpha * answer[i][i]) + max(0.0, answer[j][i] - alpha * answer[i][i])
    return total / count**2


def parts(seed=0, experts=E):
    generator = torch.Generator().manual_seed(seed)
    router_ED = torch.randn(experts, D, dtype=torch.float64, generator=generator)
    return router_ED, torch.randn(experts, F, D, dtype=torch.float64, generator=generator)


def call_with(router_ED, gate_EFD, tokens=3, step=0, mask_T=None):
    """A call of a layer with this router and these gate projections."""
    call = call_of(torch.zeros(tokens, len(router_ED), dtype=router_ED.dtype), 1, mask_T)
    experts = SwiGLU(D, gate_EFD.shape[1], len(gate_EFD)).to(router_ED.dtype)
    with torch.no_grad():
        experts.gate_up[:, : gate_EFD.shape[1]] = gate_EFD
    call.router.weight = nn.Parameter(router_ED.clone())
    return replace(call, experts=experts, step=torch.tensor(step))


def loss_of(balancer, call):
    scores = scores_of(torch.zeros(len(call.x_TD), len(call.router.weight), dtype=call.x_TD.dtype))
    return balancer.loss(call, scores, routing_of([0] * len(call.router.weight)))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.5])
def test_it_is_the_papers_double_sum(alpha):
    router_ED, gate_EFD = parts()
    loss = loss_of(Erc(E, alpha=alpha, noise=False), call_with(router_ED, gate_EFD))
    assert loss.item() == pytest.approx(by_loop(router_ED, gate_EFD, alpha).item(), rel=1e-12)


def test_noise_is_the_papers_and_follows_from_the_step():
    """The rows are multiplied by numbers around 1 that are uniform within each row's radius."""
    router_ED, gate_EFD = parts()
    balancer = Erc(E)
    blurs = [balancer.blur(router_ED, torch.tensor(step)) for step in range(400)]
    gaps = [[(a - b).norm().item() for b in router_ED] for a in router_ED]
    radius_E = torch.tensor([sorted(gap)[1] for gap in gaps]).double() / (2 * router_ED.norm(dim=1))
    deviation = (torch.stack(blurs) - 1) / radius_E[:, None]
    assert 0.99 < deviation.max() < 1
    assert -1 < deviation.min() < -0.99
    assert deviation.mean().abs() < 0.02
    assert deviation.var().item() == pytest.approx(1 / 3, rel=0.02)
    loss = loss_of(balancer, call_with(router_ED, gate_EFD, step=4))
    assert loss.item() == pytest.approx(by_loop(router_ED * blurs[4], gate_EFD, 1.0).item(), rel=1e-12)
    assert torch.equal(balancer.blur(router_ED, torch.tensor(4)), blurs[4])
    assert not torch.equal(blurs[4], blurs[5])


def test_a_blurred_row_stays_nearest_to_its_own():
    balancer = Erc(64)
    for seed in range(20):
        router_ED = torch.randn(64, D, generator=torch.Generator().manual_seed(seed))
        blurred_ED = router_ED * balancer.blur(router_ED, torch.tensor(seed))
        assert torch.cdist(blurred_ED, router_ED).argmin(1).tolist() == list(range(64))


def test_coupled_experts_without_tolerance_have_no_loss():
    """Orthogonal rows, and gates that answer to their own row alone; alpha = 0 forgives nothing."""
    router_ED = torch.eye(E, D, dtype=torch.float64)
    gate_EFD = router_ED[:, None, :] * torch.randn(F, 1, dtype=torch.float64)
    assert loss_of(Erc(E, alpha=0.0, noise=False), call_with(router_ED, gate_EFD)) == 0
    assert loss_of(Erc(E, alpha=0.0, noise=False), call_with(router_ED, gate_EFD.flip(0))) > 0.1


def test_it_grows_with_rows_and_gates_and_shrinks_with_alpha():
    router_ED, gate_EFD = parts()
    value = loss_of(Erc(E, noise=False), call_with(router_ED, gate_EFD)).item()
    assert loss_of(Erc(E, noise=False), call_with(3 * router_ED, gate_EFD)).item() == pytest.approx(3 * value)
    assert loss_of(Erc(E, noise=False), call_with(router_ED, 3 * gate_EFD)).item() == pytest.approx(3 * value)
    call = call_with(router_ED, gate_EFD)
    by_alpha = [loss_of(Erc(E, alpha=alpha, noise=False), call).item() for alpha in (0.0, 0.5, 1.0, 1.5, 50.0)]
    assert by_alpha == sorted(by_alpha, reverse=True)
    assert by_alpha[-1] == 0 < by_alpha[-2]


def test_renaming_the_experts_changes_nothing():
    router_ED, gate_EFD = parts()
    order_E = torch.tensor([3, 0, 4, 1, 2])
    values = [loss_of(Erc(E, noise=False), call_with(router_ED[o], gate_EFD[o])) for o in (torch.arange(E), order_E)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("elements", [1, 2 * E * F, 2**24])
def test_its_gradient_agrees_with_finite_differences_however_it_is_streamed(elements, monkeypatch):
    monkeypatch.setattr(erc, "ELEMENTS", elements)
    router_ED, gate_EFD = (tensor.requires_grad_() for tensor in parts())
    assert torch.autograd.gradcheck(lambda r, g: coupling(answers(r, g), 0.7), (router_ED, gate_EFD))


def test_an_answer_of_zero_has_no_gradient():
    """The square root's slope is infinite there."""
    router_ED, gate_EFD = parts()
    router_ED[1] = 0
    gate_EFD[2] = 0
    call = call_with(router_ED, gate_EFD)
    loss_of(Erc(E), call).backward()
    assert call.router.weight.grad.isfinite().all()
    assert call.experts.gate_up.grad.isfinite().all()


def test_rows_that_are_equal_are_not_blurred():
    router_ED, _ = parts()
    router_ED[3] = router_ED[0]
    blur_ED = Erc(E).blur(router_ED, torch.tensor(0))
    assert blur_ED[[0, 3]].eq(1).all()
    assert blur_ED[[1, 2, 4]].ne(1).all()


def test_it_reaches_rows_and_gates_and_nothing_else():
    router_ED, gate_EFD = parts()
    call = call_with(router_ED, gate_EFD)
    loss_of(Erc(E), call).backward()
    assert call.router.weight.grad.abs().amax(1).min() > 1e-6
    gate, up = call.experts.gate_up.grad.chunk(2, dim=1)
    assert gate.abs().amax((1, 2)).min() > 1e-6
    assert not up.any()
    assert call.experts.down.grad is None


def test_one_expert_has_no_one_to_differ_from():
    call = call_with(*parts(experts=1))
    loss = loss_of(Erc(1), call)
    loss.backward()
    assert loss == 0
    assert not call.router.weight.grad.any()


def test_a_call_without_tokens_has_no_loss():
    router_ED, gate_EFD = parts()
    assert loss_of(Erc(E), call_with(router_ED, gate_EFD, tokens=0)) == 0
    assert loss_of(Erc(E), call_with(router_ED, gate_EFD, mask_T=torch.zeros(3, dtype=torch.bool))) == 0


def test_however_a_step_is_split_it_counts_once():
    """Each micro-batch reads the same value and brings its share of the loop's scale: together, one loss."""

    def after(micro_batches):
        torch.manual_seed(1)
        layer = MoE(dim=D, hidden_dim=F, num_experts=E, top_k=2, method="erc").double()
        layer.balancers["balance_loss"].weight = 0.0
        handle, optimizer = attach_still(layer)
        handle.loss_scale = None
        x, values = torch.randn(12, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), []
        for part in x.split(12 // micro_batches):
            before = float(layer.window.sums.get("loss.erc", 0))
            (handle.follow(0 * layer(part).sum()) / micro_batches).backward()
            values.append((float(layer.window.sums["loss.erc"]) - before) / len(part))
        gradients = layer.router.weight.grad.clone(), layer.experts.gate_up.grad.clone()
        optimizer.step()
        return gradients, values, load_stats(layer)[""].loss["erc"]

    whole, (value,), read = after(1)
    for count in (2, 3, 12):
        gradients, values, other = after(count)
        assert values == pytest.approx([value] * count, rel=1e-9)
        assert other == pytest.approx(read, rel=1e-9)
        for ours, theirs in zip(gradients, whole):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert whole[0].abs().max() > 1e-4


def test_experts_without_a_gate_are_refused():
    call = replace(call_with(*parts()), experts=nn.Identity())
    with pytest.raises(UserError, match="gate_up"):
        loss_of(Erc(E), call)


@pytest.mark.parametrize("settings", [{"alpha": -1.0}, {"weight": -1.0}, {"weight": float("nan")}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Erc(E, **settings)
