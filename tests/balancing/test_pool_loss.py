import pytest
import torch
from torch import nn

from equipoise import MoE, UserError, load_stats, share_experts
from equipoise.balancing.pool_loss import PoolLoss
from equipoise.routing.norm import length_constant
from hand_made import attach_still

D, E, K, LAYERS = 7, 5, 2, 3


def pooled_layers(num_layers=LAYERS, **settings):
    torch.manual_seed(0)
    sizes = {"dim": D, "hidden_dim": 3, "num_experts": E, "top_k": K, "method": "unipool", **settings}
    layers = nn.ModuleList([MoE(**sizes).double() for _ in range(num_layers)])
    share_experts(layers)
    return layers


def run(layers, *batches):
    """One step per batch, a list of micro-batches, with a training loss of zero: what is left is the pool's.

    Returns: the layers' statistics of the last step.
    """
    handle, optimizer = attach_still(layers)
    for batch in batches:
        optimizer.zero_grad()
        for x in batch:
            handle.follow(sum(0 * layer(x).sum() for layer in layers)).backward()
        optimizer.step()
    stats = list(load_stats(layers).values())
    handle.remove()
    return stats


def shares(layers, batch):
    """f_i, the share of all layers' rows that expert i got: a loop over layers, micro-batches, tokens and choices."""
    count_E = [0] * E
    for layer in layers:
        for x in batch:
            for row in x @ layer.router.weight.T:
                for expert in row.topk(K).indices.tolist():
                    count_E[expert] += 1
    return torch.tensor(count_E).double() / sum(count_E)


def formula(layers, share_E, x, normalized):
    """``M sum_i f_i P_i`` with P_i the mean over layers and tokens of the score."""
    total = 0
    for layer in layers:
        logit_TE = x @ layer.router.weight.T
        positive_TE = logit_TE.clamp(min=0) / (logit_TE.norm(dim=1, keepdim=True) + 1e-8)
        gate_TE = layer.scorer.sigma * length_constant(E, K) * positive_TE
        total = total + (
            positive_TE / positive_TE.sum(1, keepdim=True).clamp(min=1e-20) if normalized else gate_TE
        ).mean(0)
    return E * (share_E * total / len(layers)).sum()


@pytest.mark.parametrize("normalized", [False, True])
def test_the_layers_terms_sum_to_the_pools_loss_and_so_do_their_gradients(normalized):
    """Also against finite differences of the formula; the shares are those of the whole last step."""
    layers = pooled_layers(normalized=normalized)
    first, x = [torch.randn(11, D).double(), torch.randn(4, D).double()], torch.randn(13, D).double()
    share_E = shares(layers, first)
    stats = run(layers, first, [x])
    value = formula(layers, share_E, x, normalized)
    assert sum(stat.loss["pool_loss"] for stat in stats) == pytest.approx(value.item(), rel=1e-6)
    for layer in layers:
        weight, direction = layer.router.weight, torch.randn(E, D, dtype=torch.float64)
        slope = 0.0
        with torch.no_grad():
            for sign in (1, -1):
                weight.add_(direction, alpha=sign * 1e-6)
                slope += sign * formula(layers, share_E, x, normalized).item() / 2e-6
                weight.sub_(direction, alpha=sign * 1e-6)
        assert (weight.grad * direction).sum().item() == pytest.approx(1e-2 * slope, rel=1e-4, abs=1e-9)


def test_the_first_step_adds_nothing_and_the_price_follows_the_last_one():
    layers, x = pooled_layers(), [torch.randn(9, D).double(), torch.randn(5, D).double()]
    run(layers, x)
    assert not any(layer.router.weight.grad.any() for layer in layers)
    for layer in layers:
        price_E = layer.balancers["pool_loss"].price_E.double()
        torch.testing.assert_close(price_E, E / LAYERS * shares(layers, x), rtol=1e-6, atol=0)
        vio = layer.readings()["pool_loss.max_vio"].item()
        assert vio == pytest.approx(E * shares(layers, x).max().item() - 1, rel=1e-5)
    assert pooled_layers(1)[0].readings()["pool_loss.max_vio"] == 0


def test_disjoint_layers_on_an_even_pool_are_at_the_minimum_though_each_layer_is_uneven():
    """What sets UniPool apart: layer 0 uses experts 0 and 1, layer 1 uses 2 and 3; one expert for all costs most."""
    disjoint = two_layers([[0, 1], [2, 3]])
    assert sum(stat.loss["pool_loss"] for stat in disjoint) == pytest.approx(1)
    assert [stat.max_vio for stat in disjoint] == [1, 1]  # a loss per layer would read 4 * (0.25 + 0.25) = 2
    assert [stat.readings["pool_loss.max_vio"] for stat in disjoint] == [0, 0]
    even, collapsed = two_layers([[0, 1, 2, 3], [0, 1, 2, 3]]), two_layers([[0], [0]])
    assert sum(stat.loss["pool_loss"] for stat in even) == pytest.approx(1)
    assert sum(stat.loss["pool_loss"] for stat in collapsed) == pytest.approx(4)


def two_layers(used):
    """Two steps of two layers of 4 experts, whose tokens go in turn to the experts that each layer uses."""
    layers = pooled_layers(2, num_experts=4, top_k=1, normalized=True)
    x = torch.eye(4, D).double().repeat(3, 1)
    for layer, experts in zip(layers, used):
        with torch.no_grad():
            layer.router.weight.fill_(-1.0)
            for direction in range(4):
                layer.router.weight[experts[direction % len(experts)], direction] = 1.0
    return run(layers, [x], [x])


def test_a_step_without_rows_keeps_the_price():
    balancer = PoolLoss(3)
    balancer.price_E.copy_(torch.tensor([1.0, 0.5, 1.5]))
    balancer.update({"demand_E": torch.zeros(3, dtype=torch.int64), "layers": torch.tensor(2)})
    assert balancer.price_E.tolist() == [1.0, 0.5, 1.5]
    balancer.update({"demand_E": torch.tensor([10**12 + 7, 0, 10**12 - 7]), "layers": torch.tensor(2)})
    assert balancer.price_E.tolist() == pytest.approx([0.75, 0, 0.75])


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_an_impossible_weight_is_refused(weight):
    with pytest.raises(UserError, match=r"pool_loss\.weight"):
        PoolLoss(3, weight=weight)
