import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from equipoise import MoE, UserError, forced_balance, override, replay
from equipoise.routing.top_k import TopK
from hand_made import call_of, check_order, dense, scores_of

SIZES = {"dim": 7, "hidden_dim": 5, "num_experts": 5, "top_k": 2, "method": "unbalanced"}


def model_and_tokens():
    return nn.Sequential(MoE(**SIZES), MoE(**SIZES)).double(), torch.randn(11, 7, dtype=torch.float64)


def outputs_and_gradients(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *[parameter.grad.clone() for parameter in model.parameters()]]


def test_replaying_the_own_routing_changes_neither_output_nor_gradient():
    model, x = model_and_tokens()
    expected = outputs_and_gradients(model, x)
    hooks = {name: replay(layer.routing) for name, layer in model.named_children()}
    with override(model, hooks):
        replayed = outputs_and_gradients(model, x)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(replayed, expected))


def test_replay_keeps_the_experts_and_reads_the_weights_from_the_live_gate():
    model, x = model_and_tokens()
    layer = model[0]
    layer(x)
    recorded = layer.routing
    with torch.no_grad():
        layer.router.weight.neg_()
    with override(layer, replay(recorded)):
        layer(x)
    assert torch.equal(layer.routing.expert_N, recorded.expert_N)
    gate_TE = (x @ layer.router.weight.T).softmax(1)
    _, chosen_TE = dense(recorded, 11)
    share_TE = gate_TE * chosen_TE / (gate_TE * chosen_TE).sum(1, keepdim=True)
    torch.testing.assert_close(dense(layer.routing, 11)[0], share_TE.detach(), rtol=1e-12, atol=0)
    layer(x)
    assert not torch.equal(layer.routing.expert_N, recorded.expert_N)


def test_a_recording_with_dropped_rows_is_refused():
    layer = MoE(**SIZES, capacity_factor=0.5).double()
    x = torch.randn(11, 7, dtype=torch.float64)
    layer(x)
    recorded = layer.routing
    assert recorded.dropped_E.sum() > 0
    with pytest.raises(UserError, match="rows of the recording were dropped"):
        replay(recorded)


@pytest.mark.parametrize("tokens", [4, 40])
def test_replaying_a_recording_of_another_number_of_tokens_is_refused(tokens):
    model, x = model_and_tokens()
    model(x)
    with override(model[0], replay(model[0].routing)), pytest.raises(UserError, match="22 rows"):
        model[0](torch.randn(tokens, 7, dtype=torch.float64))


def test_only_the_named_layers_are_overridden_and_blocks_nest():
    model, x = model_and_tokens()
    seen = []

    def spy(name):
        def hook(call, scores, selector):
            seen.append((name, type(selector)))
            return selector(call, scores)

        return hook

    with override(model, spy("outer")), override(model, {"1": spy("inner")}):
        model(x)
    with override(model, spy("after")):
        model(x)
    model(x)
    assert seen == [("outer", TopK), ("inner", TopK), ("after", TopK), ("after", TopK)]


def test_an_error_inside_the_block_restores_the_selector():
    model, _ = model_and_tokens()

    def fail():
        with override(model, forced_balance):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [layer.override for layer in model] == [None, None]


def test_a_name_that_is_no_layers_is_refused_and_nothing_is_overridden():
    model, _ = model_and_tokens()
    with pytest.raises(UserError, match=r"'2'.*'0', '1'"), override(model, {"0": forced_balance, "2": forced_balance}):
        pass
    assert [layer.override for layer in model] == [None, None]


def test_a_model_without_moe_layers_is_refused():
    with pytest.raises(UserError, match="no MoE layer"), override(nn.Linear(3, 3), forced_balance):
        pass


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 23), st.integers(1, 7), st.data())
def test_forced_balance_deals_rows_that_differ_by_one_at_most(num_tokens, num_experts, data):
    k = data.draw(st.integers(1, num_experts))
    mask = data.draw(st.none() | st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    gate_TE = torch.rand(num_tokens, num_experts)
    mask_T = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    routing = forced_balance(call_of(gate_TE, k, mask_T), scores_of(gate_TE), TopK(num_experts, renormalize=False))
    check_order(routing)
    tokens = num_tokens if mask is None else sum(mask)
    assert routing.load_E.sum() == tokens * k
    assert routing.load_E.max() - routing.load_E.min() <= 1
    used = routing.expert_N < num_experts
    assert torch.equal(routing.weight_N[used], gate_TE[routing.token_N[used], routing.expert_N[used]])


def test_forced_balance_ignores_a_collapsed_router_and_keeps_its_gradient():
    model, x = model_and_tokens()
    layer = copy.deepcopy(model[0])
    with torch.no_grad():
        layer.router.weight[0] = 0
        layer.router.weight[1:] = -100 * x.sign().mean(0)
    with override(layer, forced_balance):
        layer(x).square().sum().backward()
    assert sorted(layer.routing.load_E.tolist()) == [4, 4, 4, 5, 5]
    assert layer.router.weight.grad.abs().sum() > 0
