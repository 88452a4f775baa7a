import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from equipoise import MoE, UserError, load_stats
from equipoise.balancing.balance_loss import BalanceLoss
from equipoise.balancing.bias import Bias
from equipoise.contracts import Routing, Scores
from equipoise.routing import Sigmoid, Softmax, SqrtSoftplus, TopK
from hand_made import attach_still, call_of

SIZES = {"dim": 7, "hidden_dim": 5, "num_experts": 5, "top_k": 2, "kernel": "loop"}


def value_of(scope, prob_TE, demand_E, mask_T=None):
    """The loss of a routing of which only the demand is known."""
    balancer, none = BalanceLoss(len(demand_E), scope=scope), torch.zeros(0, dtype=torch.int64)
    demand_E = torch.tensor(demand_E)
    routing = Routing(none, none, torch.zeros(0), demand_E, torch.zeros_like(demand_E))
    carrier = balancer.loss(call_of(prob_TE, 1, mask_T), Scores(prob_TE, prob_TE, prob_TE, prob_TE), routing)
    return (balancer.slope(carrier, demand_E) * carrier).sum().item()


def loss_by_loop(prob_TE, chosen, sequence_T, real_T):
    """The sequence loss from its definition; ``chosen`` are the (token, expert) pairs that f counts."""
    num_experts, values = prob_TE.shape[1], []
    for sequence in sorted(set(sequence_T.tolist())):
        mine = [t for t in range(len(prob_TE)) if sequence_T[t] == sequence and real_T[t]]
        counted = [expert for token, expert in chosen if token in mine]
        if mine:
            f = [counted.count(e) / len(counted) for e in range(num_experts)]
            p = [math.fsum(prob_TE[t, e].item() for t in mine) / len(mine) for e in range(num_experts)]
            values.append(num_experts * math.fsum(a * b for a, b in zip(f, p)))
    return math.fsum(values) / max(1, len(values))


def in_sequences(call, lengths):
    """The call, its tokens lying in sequences of these lengths."""
    sequence_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    return replace(call, sequence_T=sequence_T, num_sequences=len(lengths))


def router_gradient(layer, batches, factors=None):
    """The router's gradient of the balancing losses alone: the outputs reach the loss with weight 0."""
    for x, factor in zip(batches, factors or [1.0] * len(batches)):
        (layer.window.handle.follow(0 * layer(x).sum()) * factor).backward()
    return layer.router.weight.grad


@pytest.mark.parametrize("scope", ["micro", "global"])
@pytest.mark.parametrize(("num_experts", "k"), [(2, 1), (5, 2), (7, 7), (64, 8), (96, 1)])
def test_balance_reads_one_for_any_number_of_experts(scope, num_experts, k):
    assert value_of(scope, torch.full((3, num_experts), 1 / num_experts), [k] * num_experts) == pytest.approx(1)


@pytest.mark.parametrize("scope", ["micro", "global"])
@pytest.mark.parametrize(("num_experts", "k"), [(2, 1), (5, 1), (5, 2), (64, 8)])
def test_collapse_reads_experts_over_k(scope, num_experts, k):
    prob_TE = torch.zeros(3, num_experts)
    prob_TE[:, :k] = 1 / k
    assert value_of(scope, prob_TE, [3] * k + [0] * (num_experts - k)) == pytest.approx(num_experts / k)


@pytest.mark.parametrize("frequency", ["actual", "unbiased"])
@pytest.mark.parametrize("lengths", [[23], [5, 5, 5], [1, 7, 3, 1], []])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scorer", [Softmax, Sigmoid])
def test_the_sequence_loss_is_that_of_a_loop_over_sequences(scorer, masked, lengths, frequency):
    """A bias decides what is routed; sequences may be padding as a whole."""
    logit_TE = torch.randn(sum(lengths), 7, dtype=torch.float64)
    call = in_sequences(call_of(logit_TE, 2), lengths)
    real_T = (torch.rand(sum(lengths)) < 0.6) & (call.sequence_T != 1) | (not masked)
    call = replace(call, mask_T=real_T) if masked else call
    bias, scores = Bias(7), scorer(7)(call)
    bias.bias_E.copy_(torch.randn(7))
    biased = bias.adjust(call, scores)
    balancer = BalanceLoss(7, scope="sequence", frequency=frequency)
    found = balancer.loss(call, biased, TopK(7)(call, biased))
    choice_TE = scores.gate_TE if frequency == "unbiased" else biased.choice_TE
    chosen = [(t, e) for t, row in enumerate(choice_TE) for e in row.topk(2).indices.tolist()]
    assert found.item() == pytest.approx(loss_by_loop(scores.prob_TE, chosen, call.sequence_T, real_T), rel=1e-12)


def test_balanced_sequences_read_one_and_opposite_ones_are_not_balanced_together():
    eye = torch.eye(2).double()
    for table_TE, expected in ((eye.repeat(2, 1), 1), (eye.repeat_interleave(2, 0), 2)):
        call = in_sequences(call_of(table_TE, 1), [2, 2])
        scores = Scores(table_TE, table_TE, table_TE, table_TE)
        for frequency in ("actual", "unbiased"):
            loss = BalanceLoss(2, scope="sequence", frequency=frequency).loss(call, scores, TopK(2)(call, scores))
            assert loss.item() == pytest.approx(expected)


def test_the_layer_passes_its_sequences():
    """Two sequences that collapse onto opposite experts: bad as a batch of two, balanced as one sequence of both."""
    layer = MoE(dim=2, hidden_dim=3, num_experts=2, top_k=1, method="sequence")
    layer.router.weight.data.copy_(torch.eye(2) * 50)
    _, optimizer = attach_still(layer)
    x = torch.eye(2).repeat_interleave(5, 0)
    for shape, expected in (((2, 5, 2), 2), ((1, 10, 2), 1), ((10, 2), 1)):
        layer(x.view(shape)).sum().backward()
        optimizer.step()
        assert load_stats(layer)[""].loss["balance_loss"] == pytest.approx(expected)


@pytest.mark.parametrize("frequency", ["actual", "unbiased"])
def test_the_sequence_losss_gradient_passes_gradcheck(frequency):
    call = call_of(torch.randn(13, 5, dtype=torch.float64), 2, torch.arange(13) % 5 > 0)
    call = in_sequences(call, [4, 9])
    balancer = BalanceLoss(5, scope="sequence", frequency=frequency)

    def loss(logit_TE):
        scores = Sigmoid(5)(replace(call, x_TD=logit_TE))
        return balancer.loss(call, scores, TopK(5)(call, scores))

    assert torch.autograd.gradcheck(loss, call.x_TD.clone().requires_grad_())


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_it_reads_one_where_either_loads_or_probabilities_are_even(scope):
    prob_TE = torch.rand(11, 5)
    prob_TE /= prob_TE.sum(1, keepdim=True)
    assert value_of(scope, prob_TE, [3] * 5) == pytest.approx(1)
    assert value_of(scope, torch.full((11, 5), 0.2), [9, 2, 1, 0, 3]) == pytest.approx(1)


def test_a_value_by_hand():
    prob_TE = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]])
    for scope in ("micro", "global"):
        assert value_of(scope, prob_TE, [3, 1, 0]) == pytest.approx(3 * (0.75 * 0.6 + 0.25 * 0.25))
        assert value_of(scope, prob_TE, [3, 1, 0], torch.tensor([False, True])) == pytest.approx(3 * (0.375 + 0.075))
        assert value_of(scope, prob_TE, [0, 0, 0], torch.tensor([False, False])) == 0


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_fp64_probabilities_get_an_fp64_loss(scope):
    demand_E = [3, 1, 4, 1, 5, 9, 2]
    prob_TE = torch.rand(11, 7, dtype=torch.float64)
    expected = 7 * math.fsum(d / 25 * p for d, p in zip(demand_E, prob_TE.mean(0).tolist()))
    assert value_of(scope, prob_TE, demand_E) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_layers_that_collapse_to_opposite_experts_each_score_badly(scope):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = {"dim": 3, "hidden_dim": 5, "num_experts": 2, "top_k": 1}
            self.layers = nn.ModuleList(MoE(**sizes, method="switch", scope=scope) for _ in range(2))
            for expert, layer in enumerate(self.layers):
                layer.router.weight.data.zero_()
                layer.router.weight.data[expert] = 50

        def forward(self, x):
            return sum(layer(x) for layer in self.layers)

    stack = Stack()
    handle, optimizer = attach_still(stack)
    handle.follow(stack(torch.ones(11, 3)).sum()).backward()
    optimizer.step()
    stats = load_stats(stack)
    assert [layer.load.tolist() for layer in stats.values()] == [[11, 0], [0, 11]]
    assert [layer.loss["balance_loss"] for layer in stats.values()] == pytest.approx([2, 2])


@pytest.mark.parametrize(("scope", "values"), [("micro", [2, 2]), ("global", [2, 1])])
def test_opposite_micro_batches_are_balanced_together_only_in_the_global_scope(scope, values):
    layer = MoE(dim=2, hidden_dim=3, num_experts=2, top_k=1, method="switch", scope=scope)
    layer.router.weight.data.copy_(torch.eye(2) * 50)
    attach_still(layer)
    seen = []
    for expert in range(2):
        before = float(layer.window.sums.get("loss.balance_loss", 0))
        layer(torch.eye(2)[[expert] * 5]).sum().backward()
        seen.append((float(layer.window.sums["loss.balance_loss"]) - before) / 5)  # of 5 tokens
    assert seen == pytest.approx(values)


def test_the_buffer_variants_gradient_is_that_of_its_pseudocode():
    weight, batches = 0.3, [torch.randn(tokens, 7, dtype=torch.float64) for tokens in (11, 5, 17)]
    layer = MoE(**SIZES, method="global_batch", weight=weight).double()
    plain = MoE(**SIZES, method="unbalanced").double()
    plain.load_state_dict(layer.state_dict())
    handle, _ = attach_still(layer)
    for x in batches:
        (handle.follow(layer(x).square().mean()) / len(batches)).backward()

    count = torch.zeros(5, dtype=torch.int64)
    for x in batches:
        y = plain(x)
        prob = (x @ plain.router.weight.T).softmax(-1)
        count += torch.bincount(prob.topk(2).indices.flatten(), minlength=5)
        frequency = count.double() / count.sum()
        loss = y.square().mean() + weight * 5 * (frequency * prob.mean(0)).sum()
        (loss / len(batches)).backward()
    for ours, theirs in zip(layer.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scope", ["micro", "global"])
@pytest.mark.parametrize("scorer", [Softmax, Sigmoid, SqrtSoftplus])
def test_gradient_agrees_with_finite_differences_of_the_recorded_value(scope, scorer):
    layer = MoE(**SIZES, method="switch", scope=scope, weight=1.0).double()
    layer.scorer = scorer(5)
    handle, _ = attach_still(layer)
    x = torch.randn(13, 7, dtype=torch.float64)
    gradient = router_gradient(layer, [x]).clone()

    def value(weight):
        handle.discard()
        with torch.no_grad():
            layer.router.weight.copy_(weight)
        layer(x).sum().backward()
        return (layer.window.sums["loss.balance_loss"] / layer.window.sums["tokens"]).item()

    weight, step = layer.router.weight.detach().clone(), 1e-6
    for index in [(0, 0), (2, 3), (4, 6), (1, 5)]:
        bump = torch.zeros_like(weight)
        bump[index] = step
        slope = (value(weight + bump) - value(weight - bump)) / (2 * step)
        assert gradient[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_the_weight_and_the_loops_factor_multiply_the_gradient():
    x = torch.randn(13, 7, dtype=torch.float64)

    def gradient(weight, factor):
        torch.manual_seed(1)
        layer = MoE(**SIZES, method="switch", weight=weight).double()
        attach_still(layer)
        return router_gradient(layer, [x], [factor])

    torch.testing.assert_close(gradient(0.5, 3.0), gradient(1.0, 1.0) * 1.5, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_padding_counts_nowhere(scope):
    x, mask = torch.randn(13, 7, dtype=torch.float64), torch.arange(13) % 3 > 0

    def gradient_and_value(*arguments):
        torch.manual_seed(1)
        layer = MoE(**SIZES, method="switch", scope=scope).double()
        handle, _ = attach_still(layer)
        handle.follow(0 * layer(*arguments).sum()).backward()
        return layer.router.weight.grad, layer.window.sums["loss.balance_loss"]

    for padded, dropped in zip(gradient_and_value(x, mask), gradient_and_value(x[mask])):
        torch.testing.assert_close(padded, dropped, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scope": "batch"}, "micro, global, sequence"),
        ({"scope": "sequence", "frequency": "biased"}, "actual, unbiased"),
        ({"scope": "global", "frequency": "unbiased"}, "is for scope='sequence'"),
        ({"weight": -1.0}, "at least 0"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        BalanceLoss(5, **settings)
