"""Nothing depends on the order of tokens or experts, on later text, or on anything but the seed."""

import pytest
import torch

from equipoise import METHODS, UserError, override
from hand_made import check_order
from laws.cases import SETTINGS, D, E, K, Run, differ, moves_choice, quiet, router_gradient, same, tokens

NOT_CAUSAL = [name for name, method in METHODS.items() if not method.causal]
ORDER_E = torch.tensor([3, 0, 4, 1, 2])


def shuffled(count, seed=5):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("training", [True, False])
def test_permuting_tokens_permutes_outputs(make, method, training):
    one, other = Run(make(method)), Run(make(method))
    one.layer.train(training), other.layer.train(training)
    x, order = tokens(17).requires_grad_(), shuffled(17)
    y, z = one.backward(x), other.backward(x.detach()[order].requires_grad_())
    same(z, y[order])
    same(other.counts(), one.counts())
    same(other.gradients(), one.gradients())
    one.step(), other.step()
    same(other.state(), one.state())


def test_batching_sequences_changes_no_token_in_evaluation(make, method):
    layer = make(method).eval()
    x = tokens(3, 5)
    same(torch.stack([layer(sequence) for sequence in x]), layer(x))


def permuted(layer):
    """Rename the experts: router rows, expert weights and every state move together."""
    with torch.no_grad():
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.copy_(renamed(tensor))
    return layer


def renamed(tensor):
    """The same of experts in the other order; null experts, and what is not of experts, are as they were."""
    of_experts = tensor.shape[:1] in ((E,), (E + SETTINGS["adamoe"]["nulls"],))
    return torch.cat([tensor[ORDER_E], tensor[E:]]) if of_experts else tensor


@pytest.mark.parametrize("k", [1, K])
def test_permuting_experts_changes_no_output(make, method, k):
    """...and permutes what is said of each: its gradients, its counts, its state after a step."""
    one, other = (Run(make(method, top_k=k, **quiet(method))) for _ in range(2))
    permuted(other.layer)
    x = tokens(3, 5)
    same(other.backward(x), one.backward(x))
    for name, gradient in one.gradients().items():
        same(other.gradients()[name], renamed(gradient))
    for name, count in one.counts().items():
        same(other.counts()[name], renamed(count))
    one.step(), other.step()
    for name, value in one.state().items():
        torch.testing.assert_close(other.state()[name], renamed(value), rtol=1e-6, atol=1e-7)  # a mean in another order


def trained(layer):
    run = Run(layer)
    outputs = []
    for seed in range(3):
        outputs.append(run.backward(tokens(3, 5, seed=seed)).detach())
        run.step()
    return torch.stack(outputs), {**layer.state_dict()}


def test_equal_seeds_give_equal_runs(make, method):
    """Bitwise: outputs of every step, weights and state after it; another seed gives others."""
    outputs, after = trained(make(method))
    again, same_after = trained(make(method))
    assert torch.equal(again, outputs)
    assert all(torch.equal(same_after[name], value) for name, value in after.items())
    assert differ(trained(make(method, seed=1))[0], outputs)


def test_appending_text_changes_no_earlier_output(make, method):
    layer = make(method).eval()
    x = tokens(2, 11)
    whole = layer(x)
    for length in (1, 4, 10):
        same(layer(x[:, :length].contiguous()), whole[:, :length].contiguous())


def test_memory_layout_changes_nothing(make, method):
    """Tokens that lie apart in memory, as after a transposition."""
    one, other = Run(make(method)), Run(make(method))
    x = tokens(3, 5)
    same(other.backward(x.permute(2, 1, 0).contiguous().permute(2, 1, 0)), one.backward(x))
    same(other.gradients(), one.gradients())
    same(other.counts(), one.counts())


@pytest.mark.parametrize("look", NOT_CAUSAL)
def test_what_looks_ahead_refuses_evaluation(make, look):
    """Unless a fall-back is named; and the fall-back is needed, for in training it does look ahead."""
    layer = make(look, evaluation="refuse")
    x = tokens(1, 11)
    assert differ(layer(x[:, :4]), layer(x)[:, :4])
    with pytest.raises(UserError, match="evaluation='top_k'"):
        layer.eval()(x)
    assert SETTINGS[look]["evaluation"] == "top_k"


def test_weights_ignore_the_selection_state(make, method):
    """The weights of chosen rows are read from the scores, whatever state chose them."""
    layer, seen = make(method), []

    def look(call, scores, selector):
        seen.append((scores, selector(call, scores)))
        return seen[-1][1]

    with override(layer, look):
        layer(tokens(3, 5))
    scores, routing = seen[0]
    unbiased, used_N = layer.scorer(layer.call(tokens(3, 5), None)), routing.expert_N < E
    token_N = routing.token_N[used_N]
    weight_N = unbiased.gate_TE[token_N, routing.expert_N[used_N]]
    if layer.settings.get(f"{METHODS[method].selector}.renormalize", False) is not False:
        weight_N = weight_N / torch.zeros(15).double().index_add(0, token_N, weight_N)[token_N]
    same(routing.weight_N[used_N], weight_N)
    moved = any(moves_choice(balancer) for balancer in layer.balancers.values())
    assert differ(scores.choice_TE, unbiased.choice_TE) == moved


def test_a_constant_on_the_state_changes_no_choice(make, method):
    """Only differences between experts choose."""
    one, other = make(method), make(method)
    for buffer in other.balancers.buffers():
        buffer += 0.25 if buffer.is_floating_point() else 0
    same(other(tokens(3, 5)), one(tokens(3, 5)))
    same(other.routing.load_E, one.routing.load_E)


def test_state_chooses(make, method):
    """A large bias on one expert sends it every token: the state of the laws above is not idle."""
    layer = make(method)
    choosing = [balancer for balancer in layer.balancers.values() if moves_choice(balancer)]
    for balancer in choosing:
        balancer.bias_E[1] += 2.0
    layer(tokens(3, 5))
    assert bool(choosing) == (layer.routing.load_E[1] == 15)


@pytest.mark.parametrize("k", [1, K, E])
def test_every_router_learns_from_the_task(make, method, k):
    """Also with one expert per token, where a weight made to sum to 1 would be constant."""
    layer = make(method, top_k=k, z_loss=0.0)
    for name in METHODS[method].balancers:
        layer.balancers[name].weight = 0.0
    Run(layer).backward(tokens(3, 5))
    assert router_gradient(layer)[:E].abs().amax(1).min() > 1e-6 or not layer.router.weight.requires_grad


def test_outputs_are_the_weighted_sum_of_the_experts(make, method):
    """Token by token, in a plain loop over the rows of the one routing record."""
    layer = make(method)
    x = tokens(15)
    y, routing, expected = layer(x), layer.routing, torch.zeros(15, D).double()
    rows = list(zip(routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N))
    for token, expert, weight in rows[: routing.load_E[:E].sum()]:
        gate, up = (layer.experts.gate_up[expert] @ x[token]).chunk(2)
        expected[token] += weight * (layer.experts.down[expert] @ (torch.nn.functional.silu(gate) * up))
    same(y, expected)
    check_order(routing)
