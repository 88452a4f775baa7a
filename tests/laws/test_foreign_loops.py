"""Whatever the loop: one router gradient, one set of counts, one state. The rest are the warnings that ask for more."""

import warnings

import pytest
import torch
from torch.optim import SGD

from equipoise import METHODS, UserError, attach
from laws.cases import Run, build, counts_of, differ, loss_of, no_own_loss, router_gradient, same, state_of, tokens
from laws.loops import LOOPS, micro_batches, plain

LEARNERS = [name for name, method in METHODS.items() if method.state or method.name == "global_batch"]


def outcome(layer):
    """What a loop leaves behind."""
    return counts_of(layer.window.last), state_of(layer)


@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_gives_the_same(make, method, loop):
    expected, layer = make(method), make(method)
    plain(expected, micro_batches())
    LOOPS[loop](layer, micro_batches())
    for actual, right in zip(outcome(layer), outcome(expected)):
        same(actual, right)
    same(router_gradient(layer), router_gradient(expected))


@pytest.mark.parametrize("loop", ["accumulation", "reentrant", "non_reentrant", "scaler_skips", "scaler_skips_fused"])
@pytest.mark.parametrize("frozen", ["router", "experts"])
def test_every_loop_counts_what_is_frozen(make, method, loop, frozen):
    expected, layer = make(method, shared_experts=1), make(method, shared_experts=1)  # which are never frozen
    layer.get_submodule(frozen).requires_grad_(False)
    plain(expected, micro_batches())
    LOOPS[loop](layer, micro_batches())
    for actual, right in zip(outcome(layer), outcome(expected)):
        same(actual, right)
    if frozen == "router":
        assert layer.router.weight.grad is None
    else:
        same(router_gradient(layer), router_gradient(expected))


def test_the_gradient_that_all_must_give_has_all_losses_in_it(make, method):
    """Not equal without the method's own loss, nor without the z-loss: else equality above would prove little."""
    layers = make(method), make(method, **no_own_loss(method)), make(method, z_loss=0.0)
    for layer in layers:
        plain(layer, micro_batches())
    full, no_own, no_z = (router_gradient(layer) for layer in layers)
    assert differ(full, no_z)
    assert differ(full, no_own) == bool(no_own_loss(method))


def test_uneven_token_sums_equal_one_batch(make, method):
    """Different data, uneven micro-batches, sums over tokens: a loss that is a mean over tokens allows any split."""
    whole, layer = make(method, **no_own_loss(method)), make(method, **no_own_loss(method))
    x = tokens(1, 23)
    plain(whole, [x])
    LOOPS["token_sums"](layer, list(x.split([5, 11, 7], dim=1)))
    same(router_gradient(layer), router_gradient(whole))
    for actual, right in zip(outcome(layer), outcome(whole)):
        same(actual, right)


def test_sums_and_means_over_some_tokens_agree(make, method):
    """As in fine-tuning, where prompts are no targets: one training loss, written as a mean and as a sum, is one."""
    mean, total = Run(make(method)), Run(make(method))
    target = torch.arange(15).view(3, 5) % 5 == 4
    for run, reduction, share in ((mean, "mean", 1.0), (total, "sum", 1 / 3)):
        loss = loss_of(run.layer(tokens(3, 5)), target, reduction)
        (run.handle.follow(loss, None if reduction == "mean" else 3) * share).backward()
    same(total.gradients(), mean.gradients())


def test_the_scale_is_good_for_one_backward(make, method):
    """A factor that was followed does not leak into a later backward pass, where ``loss_scale`` speaks."""
    once, leaky = Run(make(method)), Run(make(method))
    leaky.backward(tokens(2, 5, seed=4), share=100.0)
    leaky.optimizer.zero_grad()
    for run in (once, leaky):
        run.handle.loss_scale = 1.0
        loss_of(run.layer(tokens(3, 5))).backward()
    same(leaky.gradients(), once.gradients())


def test_a_failed_backward_leaves_no_scale(make, method):
    once, leaky = Run(make(method)), Run(make(method))
    y = leaky.layer(tokens(2, 5, seed=4))
    y.register_hook(_fail)
    with pytest.raises(RuntimeError, match="planted"):
        (100 * leaky.handle.follow(loss_of(y))).backward()
    for run in (once, leaky):
        run.handle.loss_scale = 1.0
        loss_of(run.layer(tokens(3, 5))).backward()
    same(leaky.gradients(), once.gradients())


def _fail(grad):
    raise RuntimeError("planted")


# Warnings: every one is an error in this suite, so a loop above that warned without need would have failed.


def test_without_follow_the_scale_is_asked_for_once(make, method):
    run = Run(make(method))
    with pytest.warns(UserWarning, match=r"handle\.follow\(loss\)"):
        loss_of(run.layer(tokens(3, 5))).backward()
    loss_of(run.layer(tokens(3, 5))).backward()


@pytest.mark.parametrize("learner", LEARNERS)
def test_without_attach_a_learner_asks_for_it_once(make, learner):
    layer = make(learner)
    with pytest.warns(UserWarning, match=r"equipoise\.attach\(model, optimizer\)"):
        loss_of(layer(tokens(3, 5))).backward()
    loss_of(layer(tokens(3, 5))).backward()


@pytest.mark.parametrize("learner", LEARNERS)
def test_whoever_attaches_late_is_still_asked_for_the_scale(make, learner):
    """The warning for the missing handle does not use up the one for the missing scale."""
    layer = make(learner)
    with pytest.warns(UserWarning, match=r"equipoise\.attach\(model, optimizer\)"):
        loss_of(layer(tokens(3, 5))).backward()
    attach(layer, SGD(layer.parameters(), lr=1e-2))
    with pytest.warns(UserWarning, match=r"handle\.follow\(loss\)"):
        loss_of(layer(tokens(3, 5))).backward()


def test_what_learns_nothing_and_loses_nothing_asks_for_nothing():
    layer = build("unbalanced", z_loss=0.0)
    with warnings.catch_warnings(record=True) as told:
        loss_of(layer(tokens(3, 5))).backward()
    assert not told


def test_follow_wants_the_loss_itself():
    run = Run(build("switch"))
    with pytest.raises(UserError, match="0-d"):
        run.handle.follow(run.layer(tokens(3, 5)))
    assert torch.equal(run.handle.follow(torch.tensor(3.0)), torch.tensor(3.0))
