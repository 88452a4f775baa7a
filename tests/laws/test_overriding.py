"""The one hook: replayed rows keep live weights and gradients, forced balance is balanced, errors leave nothing."""

import pytest
import torch

from equipoise import UserError, forced_balance, override, replay
from laws.cases import WRAPPERS, D, E, K, Run, differ, loss_of, router_gradient, same, tight, tokens


def test_replay_of_the_same_is_the_same(make, method):
    """Output, gradients and counts."""
    live, replayed = Run(make(method)), Run(make(method))
    y = live.backward(tokens(3, 5))
    with override(replayed.layer, replay(live.layer.routing)):
        z = replayed.backward(tokens(3, 5))
    same(z, y)
    same(replayed.gradients(), live.gradients())
    same(replayed.counts(), live.counts())


def test_a_replay_that_would_differ_is_refused(make, method):
    """Of a call of another size, whose tokens it would leave out; of dropped rows, whose share of a token is lost."""
    layer = make(method, **tight(method))
    layer(tokens(3, 5))
    if tight(method):
        with pytest.raises(UserError, match="dropped"):
            replay(layer.routing)
    layer = make(method)
    layer(tokens(3, 5))
    with pytest.raises(UserError, match="rows"), override(layer, replay(layer.routing)):
        layer(tokens(4, 5))


def test_replay_keeps_rows_and_live_weights(make, method):
    """Another router's rows, this router's scores: the gradient reaches this router, through these rows."""
    other, run = make(method, seed=3), Run(make(method))
    other(tokens(3, 5))
    recorded = other.routing
    with override(run.layer, replay(recorded)):
        run.backward(tokens(3, 5))
    routing = run.layer.routing
    same(routing.expert_N, recorded.expert_N)
    same(routing.token_N, recorded.token_N)
    same(run.counts()["demand_E"], recorded.demand_E())
    scores = run.layer.scorer(run.layer.call(tokens(3, 5), None))
    call = run.layer.call(tokens(3, 5), None)
    same(routing.weight_N, run.layer.selector.weigh(call, scores, recorded.token_N, recorded.expert_N).detach())
    assert differ(routing.weight_N, recorded.weight_N)
    assert router_gradient(run.layer).abs().amax(1).min() > 1e-6


def test_replay_gradient_is_right(make, method):
    """Against finite differences of the loss, with the rows held."""
    layer = make(method, z_loss=0.0)
    layer(tokens(3, 5))
    layer.eval()  # without balancing losses, which no loss value shows
    weight, direction = layer.router.weight, tokens(len(layer.router.weight), seed=4)
    assert weight.requires_grad
    with override(layer, replay(layer.routing)):
        (gradient,) = torch.autograd.grad(loss_of(layer(tokens(3, 5))), weight)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                weight.add_(direction, alpha=sign * 1e-6)
                values.append(loss_of(layer(tokens(3, 5))))
                weight.sub_(direction, alpha=sign * 1e-6)
    slope = (values[0] - values[1]) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("masked", [False, True])
def test_forced_balance_is_balanced(make, method, masked):
    """Loads differ by one row at most; padding is dealt nothing."""
    run = Run(make(method))
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(2)) < 0.7 if masked else None
    with override(run.layer, forced_balance):
        run.backward(tokens(3, 7), mask)
    load_E = run.layer.routing.load_E
    assert load_E[:E].max() - load_E[:E].min() <= 1
    assert load_E.sum() == K * (21 if mask is None else mask.sum())
    same(run.counts()["demand_E"], load_E)
    assert router_gradient(run.layer).any() == run.layer.router.weight.requires_grad


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("late", [False, True])
def test_an_overridden_forward_is_recomputed_alike(make, method, wrap, late):
    """A checkpoint recomputes in the backward pass, which may come after the block: the rows stay the block's."""
    plain, wrapped = Run(make(method)), Run(make(method))
    with override(plain.layer, forced_balance):
        plain.backward(tokens(3, 5))
    with override(wrapped.layer, forced_balance):
        y = WRAPPERS[wrap](wrapped.layer, tokens(3, 5).requires_grad_(), None)
        if not late:
            wrapped.handle.follow(loss_of(y)).backward()
    if late:
        wrapped.handle.follow(loss_of(y)).backward()
    same(wrapped.counts(), plain.counts())
    same(wrapped.gradients(), plain.gradients())


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_two_overridden_forwards_are_recomputed_alike(make, method, wrap):
    """As in a pipeline, where every micro-batch is replayed, and the forwards run ahead of the backwards."""
    plain, wrapped = Run(make(method)), Run(make(method))
    hooks = [replay(layer_routing(make(method, seed=seed))) for seed in (3, 4)]
    for hook in hooks:
        with override(plain.layer, hook):
            plain.backward(tokens(3, 5), share=0.5)
    losses = []
    for hook in hooks:
        with override(wrapped.layer, hook):
            losses.append(loss_of(WRAPPERS[wrap](wrapped.layer, tokens(3, 5).requires_grad_(), None)))
    for loss in losses:
        (wrapped.handle.follow(loss) * 0.5).backward()
    same(wrapped.counts(), plain.counts())
    same(wrapped.gradients(), plain.gradients())


def test_the_hook_is_gone_after_an_error(make, method):
    layer = make(method)
    with pytest.raises(UserError, match="tokens"), override(layer, forced_balance):
        layer(torch.zeros(3, D + 1))
    assert layer.override is None


def test_blocks_nest(make, method):
    layer = make(method)
    inner = replay(layer_routing(layer))
    with override(layer, forced_balance):
        with override(layer, {"": inner}):
            assert layer.override is inner
        assert layer.override is forced_balance
    assert layer.override is None


def layer_routing(layer):
    layer(tokens(3, 5))
    return layer.routing


def test_a_model_without_layers_is_refused():
    """Else a benchmark under forced balance would measure what it does not force."""
    with pytest.raises(UserError, match="no MoE layer"), override(torch.nn.Linear(2, 2), forced_balance):
        pass


def test_an_unknown_layer_is_refused(make, method):
    layer = torch.nn.ModuleDict({"moe": make(method)})
    with pytest.raises(UserError, match="'attention'"), override(layer, {"attention": forced_balance}):
        pass
    assert layer["moe"].override is None
