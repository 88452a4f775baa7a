import pytest
import torch
from torch import nn

from equipoise import MoE, UserError, attach, load_stats
from equipoise.balancing.relu_loss import ReluLoss
from equipoise.routing.active import Active
from equipoise.routing.relu import Relu
from hand_made import attach_still, call_of

E, K = 5, 2


def value_of(logit_TE, mask_T=None):
    call = call_of(logit_TE, K, mask_T)
    scores = Relu(E)(call)
    return ReluLoss(E).loss(call, scores, Active(E)(call, scores))


def test_the_loss_is_the_papers_in_plain_loops():
    rows = torch.randn(13, E, dtype=torch.float64).tolist()
    expected = 0.0
    for e in range(E):
        active = [row[e] for row in rows if row[e] > 0]
        expected += E / (K * 13**2) * len(active) * sum(active)
    assert value_of(torch.tensor(rows, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)


def test_with_k_active_experts_of_gate_one_each_and_equal_loads_it_is_k():
    """f_e = 1 for every expert, so the loss is the mean sum of gates: K."""
    logit_TE = torch.full((5, E), -1.0)
    for t in range(5):
        logit_TE[t, [t, (t + 1) % 5]] = 1.0
    assert value_of(logit_TE).item() == pytest.approx(K)


def test_padding_does_not_count_and_no_tokens_cost_nothing():
    logit_TE, mask_T = torch.randn(11, E), torch.arange(11) % 3 > 0
    assert value_of(logit_TE, mask_T).item() == pytest.approx(value_of(logit_TE[mask_T]).item())
    assert value_of(logit_TE, torch.zeros(11, dtype=torch.bool)) == 0


def test_gradient_agrees_with_finite_differences():
    logit_TE = torch.randn(7, E, dtype=torch.float64).requires_grad_()
    assert logit_TE.detach().abs().min() > 1e-4  # away from the kink
    assert torch.autograd.gradcheck(value_of, (logit_TE,))


def coefficient(*rows, start=1e-2, **settings):
    """The coefficient after steps in which so many of 100 possible rows were active, and 40 wanted."""
    balancer = ReluLoss(E, start=start, **settings)
    for count in rows:
        numbers = {"rows": count, "wanted": 40, "possible": 100, "layers": 1}
        balancer.update({name: torch.tensor(number) for name, number in numbers.items()})
    return balancer


@pytest.mark.parametrize(
    ("rows", "factor"), [([41], 1.2), ([39], 1 / 1.2), ([40], 1.0), ([100, 99, 0], 1.2), ([0, 0], 1.2**-2)]
)
def test_it_rises_where_too_many_are_active_and_falls_where_too_few(rows, factor):
    found = coefficient(*rows).readings()
    assert found["coefficient"].item() == pytest.approx(1e-2 * factor, rel=1e-6)
    assert found["sparsity"].item() == pytest.approx(1 - rows[-1] / 100)


def test_it_stays_in_reach_and_a_start_of_zero_stays_zero():
    assert coefficient(*[0] * 500).coefficient.item() == pytest.approx(1e-30)
    assert coefficient(*[100] * 500, start=1e28).coefficient.item() == pytest.approx(1e30)
    assert coefficient(*[100] * 5, start=0.0).coefficient == 0
    assert coefficient(50, factor=2.0).coefficient.item() == pytest.approx(2e-2)


def test_a_step_without_tokens_changes_nothing():
    balancer = coefficient(70)
    before = {name: value.clone() for name, value in balancer.readings().items()}
    balancer.update(dict.fromkeys(("rows", "wanted", "possible", "layers"), torch.tensor(0)))
    assert balancer.readings() == before


def test_all_layers_together_are_steered():
    """One layer has all experts active, one none, so that half of all are, on average 2 of 4: as K asks."""
    torch.manual_seed(0)
    model = nn.ModuleList([MoE(dim=3, hidden_dim=2, num_experts=4, top_k=2, method="relu", start=0.5) for _ in "12"])
    for layer, sign in zip(model, (1, -1)):
        nn.init.constant_(layer.router.weight, float(sign))
    handle, optimizer = attach_still(model)
    handle.follow(sum(layer(torch.ones(5, 3)).sum() for layer in model)).backward()
    optimizer.step()
    for layer in model:
        assert layer.readings()["relu_loss.sparsity"] == 0.5
        assert layer.readings()["relu_loss.coefficient"] == 0.5
    assert [stat.load.sum() for stat in load_stats(model).values()] == [20, 0]


def test_training_reaches_k_experts_per_token():
    """From a dense start: 2 of 8 experts and more are active at first, and 1 is asked for.

    The tokens have a common mean: else a router without bias has half of its experts active, whatever its weights.
    """
    torch.manual_seed(0)
    layer = MoE(dim=16, hidden_dim=4, num_experts=8, top_k=1, method="relu", start=1e-4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    handle, active = attach(layer, optimizer), []
    for _ in range(150):
        x = torch.randn(256, 16) + 1
        handle.follow((layer(x) - x).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        active.append(int(layer.routing.load_E.sum()) / 256)
    assert active[0] > 2
    assert sum(active[-20:]) / 20 == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize(
    ("name", "value"), [("start", -1.0), ("start", float("inf")), ("factor", 1.0), ("factor", 0.5)]
)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(UserError, match=f"relu_loss.{name}"):
        ReluLoss(E, **{name: value})
