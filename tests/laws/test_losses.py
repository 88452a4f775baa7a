"""Balancing losses: what they read, that they reach the router, and that layers and splits keep their own values."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from equipoise import METHODS, attach, forced_balance, load_stats, override
from laws.cases import FORMULAS, D, E, K, Run, build, loss_of, no_own_loss, same, tight, tokens

Z_WEIGHT = 0.1


def formula(layer, x, mask):
    """The losses once more, from the logits and the routing alone: their values by name, raw."""
    logit_TE = x[mask] @ layer.router.weight.T
    raw = logit_TE.softmax(-1) if METHODS[layer.method].scorer == "softmax" else logit_TE.sigmoid()
    prob_E = (raw / raw.sum(-1, keepdim=True)).mean(0)
    share_E = layer.routing.demand_E() / layer.routing.demand_E().sum().double()
    values = {"z_loss": (logit_TE.exp().sum(-1).log() ** 2).mean()}
    if "balance_loss" in METHODS[layer.method].balancers:
        values["balance_loss"] = len(prob_E) * (share_E * prob_E).sum()
    if layer.settings.get("balance_loss.scope") == "sequence":
        values["balance_loss"] = formula_of_sequences(layer, x, mask, raw)
    return values | {name: FORMULAS[name](layer, logit_TE) for name in layer.balancers if name in FORMULAS}


def formula_of_sequences(layer, x, mask, raw):
    """The mean over the sequences of E * sum_i f_i P_i: a loop over sequences, and over the rows that f counts."""
    rows, sequence = list(zip(layer.routing.token_N.tolist(), layer.routing.expert_N.tolist())), mask.nonzero()[:, 0]
    if layer.settings["balance_loss.frequency"] == "unbiased":
        real = mask.flatten().nonzero()[:, 0].tolist()
        rows = [(token, e) for token, row in zip(real, raw) for e in row.topk(K).indices.tolist()]
    values = []
    for index in sequence.unique():
        mine_E = [0] * E
        for token, expert in rows:
            if token // x.shape[1] == index and expert < E:
                mine_E[expert] += 1
        prob_E = (raw / raw.sum(-1, keepdim=True))[sequence == index].mean(0)
        values.append(E * (torch.tensor(mine_E).double() / sum(mine_E) * prob_E).sum())
    return torch.stack(values).mean()


def test_losses_reach_the_router_as_written(make, method):
    """The router's gradient is the task's plus each formula's times its weight; the values read are the formulas'."""
    run, task = Run(make(method)), Run(make(method, z_loss=0.0, **no_own_loss(method)))
    x, mask = tokens(3, 5), torch.rand(3, 5, generator=torch.Generator().manual_seed(6)) < 0.7
    run.backward(x, mask), task.backward(x, mask)
    assert run.layer.router.weight.requires_grad
    weight, values = run.layer.router.weight, formula(run.layer, x, mask)
    balancers = run.layer.balancers
    wanted = sum(balancers[name].weight * value for name, value in values.items())
    (expected,) = torch.autograd.grad(wanted, weight)
    same(weight.grad - task.layer.router.weight.grad, expected)
    run.optimizer.step()
    stats = load_stats(run.layer)[""]
    assert stats.loss == pytest.approx({name: value.item() for name, value in values.items()}, rel=1e-12)
    assert stats.weighted_loss == pytest.approx({n: balancers[n].weight * v.item() for n, v in values.items()})
    assert balancers["z_loss"].weight == Z_WEIGHT


@pytest.mark.parametrize(("experts", "k"), [(5, 1), (5, 2), (7, 3), (3, 3)])
def test_balance_reads_one(make, method, experts, k):
    """For any E and K: with equal loads, of each sequence too, the balance loss is 1, whatever the probabilities."""
    run = Run(make(method, num_experts=experts, top_k=k))
    with override(run.layer, forced_balance):
        run.backward(tokens(3, experts))
    run.optimizer.step()
    stats = load_stats(run.layer)[""]
    assert stats.loss.get("balance_loss", 1.0) == pytest.approx(1.0)
    assert (stats.max_vio, stats.cv, stats.entropy, stats.dead) == pytest.approx((0, 0, 1, 0))


def collapse(layer, expert):
    """Send every token that points along the first axis to one of two experts."""
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = -50.0
        layer.router.weight[expert, 0] = 50.0
    return layer


def test_mirrored_layers_score_badly(make, method):
    """Two layers, each collapsed, onto opposite experts: pooled they look balanced; each reads E, not 1."""
    model = nn.ModuleList([collapse(make(method, num_experts=2, top_k=1), expert) for expert in range(2)])
    optimizer = SGD(model.parameters(), lr=1e-3)
    handle = attach(model, optimizer)
    x = torch.eye(1, D).double().expand(14, D)
    (handle.follow(loss_of(model[0](x)) + loss_of(model[1](x)))).backward()
    optimizer.step()
    stats = load_stats(model)
    assert [stats[name].load.tolist() for name in "01"] == [[14, 0], [0, 14]]
    for layer in stats.values():
        assert (layer.max_vio, layer.dead) == (1, 1)
        assert layer.loss.get("balance_loss", 2.0) == pytest.approx(2.0)


def test_names_of_layers_do_not_collide():
    """A model may have an attribute called ``module``, as wrappers do: no layer is lost."""
    model = nn.ModuleDict({"moe": build("switch"), "module": nn.ModuleDict({"moe": build("switch")})})
    assert len(attach(model, ()).layers) == 2


@pytest.mark.parametrize("sizes", [(5, 11, 7), (23, 0)])
def test_the_value_read_does_not_depend_on_the_split(make, method, sizes):
    """Micro-batches count by their tokens: an uneven split, or an empty part of it, reads what one batch reads."""
    x = tokens(1, 23)
    whole, split = Run(make(method)), Run(make(method))
    whole.backward(x)
    for part in x.split(sizes, dim=1):
        split.backward(part, share=part.shape[1] / 23)
    whole.optimizer.step(), split.optimizer.step()
    one, other = (load_stats(run.layer)[""] for run in (whole, split))
    assert other.loss["z_loss"] == pytest.approx(one.loss["z_loss"], rel=1e-12)
    assert other.max_vio == one.max_vio or METHODS[method].looks_ahead
    if sizes[1] == 0:  # one real micro-batch: every loss is that of the whole
        assert other.loss == pytest.approx(one.loss, rel=1e-12)


def test_a_dropped_row_is_demand(make, method):
    """Balancing acts on what was chosen, not on what found room; the load and the drops add up to it."""
    free, full = Run(make(method)), Run(make(method, **tight(method)))
    x = tokens(3, 5)
    free.backward(x), full.backward(x)
    same(full.counts()["demand_E"], free.counts()["demand_E"])
    routing = full.layer.routing
    same(routing.load_E + routing.dropped_E, full.counts()["demand_E"])
    assert full.counts()["dropped"] == routing.dropped_E.sum()
    assert int(full.counts()["demand_E"].sum()) == 15 * K
