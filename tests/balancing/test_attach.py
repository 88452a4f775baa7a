import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW

from equipoise import MoE, UserError, attach, load_stats
from hand_made import attach_still

SIZES = {"dim": 7, "hidden_dim": 5, "num_experts": 5, "top_k": 2, "kernel": "loop"}


def layer_and_optimizer(method="loss_free", **settings):
    layer = MoE(**SIZES, method=method, **settings)
    return layer, SGD(layer.parameters(), lr=0.01)


def counted(layer):
    """Tokens in the open window."""
    return int(layer.window.sums.get("tokens", 0))


def train(layer, tokens=11, factor=1.0):
    (layer(torch.randn(tokens, 7)).square().mean() * factor).backward()


def committed(layer):
    return int(layer.step), int(layer.window.last.get("tokens", 0))


def test_follow_changes_neither_value_nor_gradient():
    layer, optimizer = layer_and_optimizer("unbalanced")
    handle, x = attach(layer, optimizer), torch.randn(11, 7)
    loss = layer(x).square().mean()
    followed = handle.follow(loss)
    assert followed is not loss
    assert torch.equal(followed, loss)
    (plain,) = torch.autograd.grad(loss * 3, layer.router.weight, retain_graph=True)
    (through,) = torch.autograd.grad(followed * 3, layer.router.weight)
    assert torch.equal(plain, through)


@pytest.mark.parametrize(("count", "times"), [(None, 1), (8, 8), (torch.tensor(8), 8)])
def test_follow_hands_the_loops_factor_to_the_balancing_losses(count, times):
    layer, optimizer = layer_and_optimizer("switch")
    handle, x, mask = attach(layer, optimizer), torch.randn(11, 7), torch.arange(11) < 8

    def gradient(factor, **arguments):
        layer.router.weight.grad = None
        (handle.follow(0 * layer(x, mask).sum(), **arguments) * factor).backward()
        return layer.router.weight.grad

    once = gradient(1.0)
    torch.testing.assert_close(gradient(0.25, count=count), once * 0.25 * times)


def test_loss_scale_serves_where_nothing_is_followed_and_a_followed_factor_wins():
    layer, optimizer = layer_and_optimizer("switch")
    handle, x = attach(layer, optimizer), torch.randn(11, 7)

    def gradient(factor, follow):
        layer.router.weight.grad = None
        loss = 0 * layer(x).sum()
        ((handle.follow(loss) if follow else loss) * factor).backward()
        return layer.router.weight.grad

    followed = gradient(1.0, follow=True)
    handle.loss_scale = 5.0
    torch.testing.assert_close(gradient(3.0, follow=False), followed * 5)
    torch.testing.assert_close(gradient(3.0, follow=True), followed * 3)
    torch.testing.assert_close(gradient(3.0, follow=False), followed * 5)


def test_follow_refuses_what_it_cannot_follow():
    layer, optimizer = layer_and_optimizer()
    handle = attach(layer, optimizer)
    with pytest.raises(UserError, match=r"0-d loss.*\(2,\).*reduce it"):
        handle.follow(torch.zeros(2))


def test_a_model_without_moe_layers_is_refused():
    with pytest.raises(UserError, match="no MoE layer"):
        attach(nn.Linear(3, 3), [])


def test_two_attaches_are_refused_until_the_first_is_removed():
    layer, optimizer = layer_and_optimizer()
    handle = attach(layer, optimizer)
    with pytest.raises(UserError, match=r"attached already; call \.remove\(\)"):
        attach(nn.Sequential(layer), optimizer)
    handle.remove()
    attach(layer, optimizer)
    train(layer)
    optimizer.step()
    assert committed(layer) == (1, 11)


def test_a_step_commits_the_window_and_opens_the_next():
    layer, optimizer = layer_and_optimizer()
    attach(layer, optimizer)
    for step in range(1, 4):
        train(layer)
        train(layer, tokens=5)
        assert counted(layer) == 16
        optimizer.step()
        assert committed(layer) == (step, 16)
        assert counted(layer) == 0
        optimizer.zero_grad()


def test_a_step_without_a_backward_pass_commits_nothing():
    layer, optimizer = layer_and_optimizer()
    attach(layer, optimizer)
    train(layer)
    optimizer.step()
    optimizer.step()
    assert committed(layer) == (1, 11)


def test_remove_restores_everything():
    layer, optimizer = layer_and_optimizer()
    before = vars(optimizer).keys() - {"_optimizer_step_post_hooks"}
    handle = attach(layer, optimizer)
    handle.remove()
    assert vars(optimizer).keys() - {"_optimizer_step_post_hooks"} == before
    assert len(optimizer._optimizer_step_post_hooks) == 0
    assert layer.window.handle is None
    with pytest.warns(UserWarning, match="attach"):
        train(layer)
    optimizer.step()
    assert committed(layer) == (0, 0)
    optimizer.zero_grad()
    assert layer.router.weight.grad is None


def test_remove_leaves_an_own_zero_grad_of_the_optimizer_alone():
    layer, optimizer = layer_and_optimizer()
    called = []
    own = optimizer.zero_grad = lambda *arguments, **keywords: called.append(arguments)
    handle = attach(layer, optimizer)
    optimizer.zero_grad()
    assert called == [()]
    handle.remove()
    assert optimizer.zero_grad is own


def test_removing_one_of_two_models_leaves_the_other_attached():
    first, second = MoE(**SIZES, method="loss_free"), MoE(**SIZES, method="loss_free")
    optimizer = SGD([*first.parameters(), *second.parameters()], lr=0.01)
    attach(first, optimizer)
    attach(second, optimizer).remove()
    train(first)
    optimizer.zero_grad()
    assert counted(first) == 0
    train(first)
    optimizer.step()
    assert committed(first) == (1, 11)


def test_gradients_that_are_thrown_away_take_their_counts_along():
    layer, optimizer = layer_and_optimizer()
    attach(layer, optimizer)
    train(layer)
    optimizer.zero_grad()
    assert counted(layer) == 0
    train(layer, tokens=5)
    optimizer.step()
    assert committed(layer) == (1, 5)


def test_zero_grad_passes_its_arguments_on():
    layer, optimizer = layer_and_optimizer()
    attach(layer, optimizer)
    train(layer)
    optimizer.zero_grad(set_to_none=False)
    assert layer.router.weight.grad.eq(0).all()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_several_optimizers_commit_once_when_all_have_stepped(order):
    layer = MoE(**SIZES, method="loss_free")
    optimizers = [SGD([layer.router.weight], lr=0.01), AdamW(layer.experts.parameters(), lr=0.01)]
    attach(layer, optimizers)
    for step in range(1, 4):
        train(layer)
        for index in order:
            assert committed(layer)[0] == step - 1
            optimizers[index].step()
            optimizers[index].zero_grad()
        assert committed(layer) == (step, 11)


def test_an_optimizer_that_steps_rarely_holds_the_window_open():
    layer = MoE(**SIZES, method="loss_free")
    often, rarely = SGD([layer.router.weight], lr=0.01), SGD(layer.experts.parameters(), lr=0.01)
    attach(layer, (often, rarely))
    for _ in range(2):
        train(layer)
        often.step()
        often.zero_grad()
    rarely.step()
    assert committed(layer) == (1, 22)


def test_an_optimizer_with_a_closure_commits_its_last_evaluation():
    layer = MoE(**SIZES, method="loss_free")
    optimizer = LBFGS(layer.parameters(), max_iter=4)
    attach(layer, optimizer)
    x, evaluations = torch.randn(11, 7), []

    def closure():
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        evaluations.append(layer.routing.load_E)
        return loss

    for step in range(1, 3):
        optimizer.step(closure)
        assert committed(layer) == (step, 11)
        assert torch.equal(layer.window.last["demand_E"], evaluations[-1])
    assert len(evaluations) > 4


def test_steps_and_discards_by_hand():
    layer = MoE(**SIZES, method="loss_free")
    handle = attach(layer, [])
    train(layer)
    handle.discard()
    assert counted(layer) == 0
    handle.step()
    assert committed(layer) == (0, 0)
    train(layer)
    train(layer)
    handle.step()
    assert committed(layer) == (1, 22)
    assert layer.balancers["bias"].bias_E.abs().max() > 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips_is_not_committed(fused):
    layer = MoE(**SIZES, method="loss_free")
    optimizer = AdamW(layer.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    attach(layer, optimizer)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(layer(torch.randn(11, 7)).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert committed(layer) == (1, 11)


def test_every_layer_is_committed_also_one_that_saw_nothing():
    model = nn.ModuleDict({"used": MoE(**SIZES, method="loss_free"), "idle": MoE(**SIZES, method="loss_free")})
    _, optimizer = attach_still(model)
    train(model["used"])
    optimizer.step()
    assert committed(model["used"]) == (1, 11)
    assert committed(model["idle"]) == (1, 0)
    assert model["idle"].balancers["bias"].bias_E.eq(0).all()
    stats = load_stats(model)["idle"]
    assert (stats.load.tolist(), stats.dead, stats.max_vio) == ([0] * 5, 5, 0)


def test_evaluation_between_backward_and_step_counts_nothing():
    layer, optimizer = layer_and_optimizer()
    attach(layer, optimizer)
    train(layer)
    layer.eval()(torch.randn(13, 7)).sum().backward()
    with torch.no_grad():
        layer.train()(torch.randn(13, 7))
    assert counted(layer) == 11
