"""A micro-batch that reaches a loss is counted once, whatever the loop does around it; nothing else is counted."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from equipoise import UserError, attach
from laws.cases import WRAPPERS, Run, counts_of, differ, loss_of, no_own_loss, router_gradient, same, tokens


def test_a_call_is_counted_as_it_was_routed(make, method):
    run = Run(make(method))
    run.backward(tokens(3, 5))
    counts = run.counts()
    same(counts["demand_E"], run.layer.routing.demand_E())
    assert counts["tokens"] == 15
    assert {value.dtype for value in counts.values()} == {torch.int64}


def test_counts_are_exact(make, method):
    """More rows per expert than bf16 has integers for."""
    run, demand_E = Run(make(method)), 0
    for seed in range(3):
        run.backward(tokens(1, 1009, seed=seed))
        demand_E = demand_E + run.layer.routing.demand_E()
    same(run.counts()["demand_E"], demand_E)
    assert run.counts()["tokens"] == 3027


@pytest.mark.parametrize("wrap", [wrap for wrap in WRAPPERS if wrap != "plain"])
def test_what_wraps_a_layer_changes_nothing(make, method, wrap):
    plain, wrapped = Run(make(method)), Run(make(method))
    x, again = tokens(3, 5).requires_grad_(), tokens(3, 5).requires_grad_()
    same(wrapped.backward(again, wrap=wrap), plain.backward(x))
    same(wrapped.counts(), plain.counts())
    same(wrapped.gradients(), plain.gradients())
    same(again.grad, x.grad)
    assert wrapped.layer.window.sums["calls"] == 1


def test_evaluation_is_not_counted(make, method):
    run = Run(make(method))
    run.layer.eval()
    run.backward(tokens(3, 5))
    assert not run.layer.window.sums


def test_no_grad_is_not_counted(make, method):
    run = Run(make(method))
    with torch.no_grad():
        run.layer(tokens(3, 5))
    assert not run.layer.window.sums


def test_output_that_reaches_no_loss_is_not_counted(make, method):
    run = Run(make(method))
    run.layer(tokens(3, 5))
    assert not run.layer.window.sums
    run.layer(tokens(3, 5, seed=2))
    run.backward(tokens(2, 5, seed=3))
    assert run.counts()["tokens"] == 10


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_second_backward_is_not_counted(make, method, wrap):
    """It brings the training loss's gradient once more, but no count and no balancing loss."""
    runs = Run(make(method)), Run(make(method)), Run(make(method, z_loss=0.0, **no_own_loss(method)))
    inputs = [tokens(3, 5).requires_grad_() for _ in runs]
    for run, x, times in zip(runs, inputs, (1, 2, 1)):
        loss = run.handle.follow(loss_of(WRAPPERS[wrap](run.layer, x, None)))
        for _ in range(times):
            loss.backward(retain_graph=True)
    once, twice, task = runs
    same(twice.counts(), once.counts())
    assert twice.layer.window.sums["calls"] == 1
    same(router_gradient(twice.layer), router_gradient(once.layer) + router_gradient(task.layer))
    same(inputs[1].grad, inputs[0].grad + inputs[2].grad)
    assert differ(inputs[1].grad, 2 * inputs[0].grad)


def test_two_losses_of_one_graph_are_one_micro_batch(make, method):
    one, two = Run(make(method)), Run(make(method))
    one.backward(tokens(3, 5))
    y = two.layer(tokens(3, 5))
    two.handle.follow(loss_of(y)).backward(retain_graph=True)
    two.handle.follow(y.sum()).backward()
    same(two.counts(), one.counts())


def test_accumulation_counts_and_learns_as_one_batch(make, method):
    """Uneven micro-batches of different data; counts and state are equal to the last bit."""
    batch, split = Run(make(method)), Run(make(method))
    x = tokens(1, 23)
    batch.backward(x)
    for part in x.split([5, 11, 7], dim=1):
        split.backward(part, share=part.shape[1] / 23)
    same(split.counts(), batch.counts())
    batch.step(), split.step()
    same(split.state(), batch.state())


def test_zeroed_gradients_take_their_counts_along(make, method):
    fresh, skipped = Run(make(method)), Run(make(method))
    skipped.backward(tokens(2, 7, seed=9))
    before = skipped.state()
    skipped.optimizer.zero_grad()
    assert not skipped.layer.window.sums
    same(skipped.state(), before)
    for run in (fresh, skipped):
        run.backward(tokens(3, 5))
        run.step()
    same(counts_of(skipped.layer.window.last), counts_of(fresh.layer.window.last))
    same(skipped.state(), fresh.state())


def test_discard_forgets(make, method):
    run = Run(make(method))
    run.backward(tokens(3, 5))
    before = run.state()
    run.handle.discard()
    assert not run.layer.window.sums
    same(run.state(), before)


def test_what_is_detached_forgets_its_window(make, method):
    """Counts of gradients that the removed handle's optimizer never used are not those of the next one."""
    fresh, moved = Run(make(method)), Run(make(method))
    moved.backward(tokens(2, 7, seed=9))
    moved.handle.remove()
    moved.optimizer.zero_grad()
    moved.handle = attach(moved.layer, moved.optimizer)
    for run in (fresh, moved):
        run.backward(tokens(3, 5))
    same(moved.counts(), fresh.counts())


def test_a_model_is_attached_once(make, method):
    run = Run(make(method))
    with pytest.raises(UserError, match="attached already"):
        attach(run.layer, run.optimizer)
    run.handle.remove()
    attach(run.layer, run.optimizer)


@pytest.mark.parametrize("frozen", ["router", "experts", ""])  # "" is the whole layer
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_what_is_frozen_is_counted(make, method, frozen, wrap):
    free, some = Run(make(method)), Run(make(method))
    some.layer.get_submodule(frozen).requires_grad_(False)
    free.backward(tokens(3, 5))
    some.backward(tokens(3, 5).requires_grad_(), wrap=wrap)
    same(some.counts(), free.counts())
    same(some.gradients(), {name: grad for name, grad in free.gradients().items() if not name.startswith(frozen)})


@pytest.mark.parametrize("wrap", ["plain", "non_reentrant", "offloaded"])
@pytest.mark.parametrize("frozen", [False, True])
def test_tokens_without_gradient_are_counted(make, method, wrap, frozen):
    """As in a first layer behind a frozen embedding; the router learns all the same, if it may."""
    free, other = Run(make(method)), Run(make(method).requires_grad_(not frozen))
    free.backward(tokens(3, 5).requires_grad_())
    other.backward(tokens(3, 5), wrap=wrap)
    same(other.counts(), free.counts())
    same(other.gradients(), {} if frozen else free.gradients())


def test_a_checkpoint_that_would_lose_the_backward_is_refused(make, method):
    """A reentrant one without a differentiable input: torch would run no backward inside, and say so in a warning."""
    layer = make(method)
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"),
        pytest.raises(UserError, match="use_reentrant=False"),
    ):
        checkpoint(layer, tokens(3, 5), use_reentrant=True)


def test_a_layer_used_twice_counts_both_uses(make, method):
    one, other, both = Run(make(method)), Run(make(method)), Run(make(method))
    x, z = tokens(3, 5), tokens(2, 5, seed=2)
    one.backward(x), other.backward(z)
    (both.handle.follow(loss_of(both.layer(x)) + loss_of(both.layer(z)))).backward()
    same(both.counts(), {name: one.counts()[name] + other.counts()[name] for name in both.counts()})
    assert both.layer.window.sums["calls"] == 2


def test_a_layer_used_twice_pays_for_both_uses(make, method):
    """The sum of what each use alone would bring; the loss over the global batch is left out, it sees their union."""
    one, other, both = (Run(make(method, **no_own_loss(method))) for _ in range(3))
    x, z = tokens(3, 5), tokens(2, 5, seed=2)
    one.backward(x), other.backward(z)
    (both.handle.follow(loss_of(both.layer(x)) + loss_of(both.layer(z)))).backward()
    same(both.gradients(), {name: grad + other.gradients()[name] for name, grad in one.gradients().items()})
