"""What lasts: it stands still between steps, moves by the rules, survives casts and files, and is never a counter."""

import copy
import io
import pickle

import pytest
import torch
from torch.optim import AdamW

from equipoise import METHODS, attach, forced_balance, load_stats, override
from laws.cases import D, E, Run, build, loss_of, same, state_of, tokens


def settled(run):
    """The state without the count of steps, which every step moves, and the keys of noise, which nothing does."""
    return {name: value for name, value in run.state().items() if name.rpartition(".")[2] not in ("step", "key")}


def part_of(name, method):
    """The part of the method that a buffer is the state of; what a router learns is its scorer's."""
    owner, part = name.split(".")[:2]
    return part if owner == "balancers" else METHODS[method].selector if owner == "selector" else METHODS[method].scorer


def test_selection_state_stands_still_between_steps(make, method):
    run = Run(make(method))
    before = run.state()
    for seed in range(3):
        run.backward(tokens(3, 5, seed=seed), share=1 / 3)
        same(run.state(), before)
    run.step()
    moved = {name for name, value in settled(run).items() if not torch.equal(value, before[name])}
    assert {part_of(name, method) for name in moved} == set(METHODS[method].state)
    assert run.layer.step == 1


@pytest.mark.parametrize("grad", [True, False])
def test_evaluation_changes_nothing(make, method, grad):
    run = Run(make(method))
    run.layer.eval()
    before = settled(run)
    with torch.set_grad_enabled(grad):
        y = run.layer(tokens(3, 5))
    if grad:
        loss_of(y).backward()
    assert not run.layer.window.sums
    run.handle.step()
    same(settled(run), before)


def test_training_forward_changes_nothing(make, method):
    run = Run(make(method))
    before = settled(run)
    for _ in range(2):
        run.layer(tokens(3, 5))
        with torch.no_grad():
            run.layer(tokens(3, 5))
    run.handle.step()
    same(settled(run), before)


def through_bytes(layer):
    return pickle.loads(pickle.dumps(layer))


def through_a_file(layer):
    """Saved, and loaded into a layer that was cast before."""
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = build(layer.method, seed=5).to(torch.bfloat16)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


JOURNEYS = {
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
    "half": lambda layer: layer.half(),
    "double": lambda layer: layer.double(),
    "there and back": lambda layer: layer.bfloat16().float(),
    "inside a model": lambda layer: torch.nn.Sequential(layer).half()[0],
    "deepcopy": copy.deepcopy,
    "pickle": through_bytes,
    "file": through_a_file,
    "cast, copied, filed": lambda layer: through_a_file(through_bytes(copy.deepcopy(layer.bfloat16()))),
}


@pytest.mark.parametrize("journey", JOURNEYS)
def test_state_survives(make, method, journey):
    """Bit for bit; fp32 or int64, whatever the weights became."""
    layer = make(method)
    layer.step += 3
    before = state_of(layer)
    after = state_of(JOURNEYS[journey](layer))
    same(after, before)
    assert {value.dtype for value in after.values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("journey", ["deepcopy", "pickle"])
def test_a_copy_trains_by_itself(make, method, journey):
    """The copy is not attached, counts what the original would, and the original hears nothing of it."""
    run = Run(make(method))
    run.backward(tokens(3, 5))
    counts, copied = run.counts(), Run(JOURNEYS[journey](run.layer))
    copied.optimizer.zero_grad()
    copied.backward(tokens(3, 5))
    same(copied.counts(), counts)
    same(run.counts(), counts)
    copied.step(), run.step()
    same(copied.state(), run.state())


def steps(layer, optimizer, seeds):
    handle = attach(layer, optimizer)
    for seed in seeds:
        optimizer.zero_grad()
        handle.follow(loss_of(layer(tokens(3, 5, seed=seed)))).backward()
        optimizer.step()
    handle.remove()


def test_training_resumes_identically(make, method):
    through = make(method)
    optimizer = AdamW(through.parameters(), lr=1e-2)
    steps(through, optimizer, range(2))
    saved = copy.deepcopy((through.state_dict(), optimizer.state_dict()))
    steps(through, optimizer, range(2, 5))
    resumed = make(method, seed=7)
    optimizer = AdamW(resumed.parameters(), lr=1e-2)
    resumed.load_state_dict(saved[0]), optimizer.load_state_dict(saved[1])
    steps(resumed, optimizer, range(2, 5))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in through.state_dict().items())


def test_statistics_are_not_buffers(make, method):
    """What is saved, and what DDP broadcasts, are parameters, the state and the step; nothing that counts."""
    run = Run(make(method))
    run.backward(tokens(3, 5))
    buffers = dict(run.layer.named_buffers())
    assert {part_of(name, method) for name in settled(run)} == set(METHODS[method].state)
    assert run.layer.state_dict().keys() == buffers.keys() | dict(run.layer.named_parameters()).keys()
    memory = {buffer.data_ptr() for buffer in buffers.values()}
    assert all(value.data_ptr() not in memory for value in run.layer.window.sums.values())


def test_an_idle_layer_steps_too(make, method):
    """``step`` is how often the optimizer stepped, whether or not the layer saw tokens; what it read is not stale."""
    model = torch.nn.ModuleList([make(method), make(method)])
    run = Run(model)
    for used in ([0, 1], [0]):
        for index in used:
            run.handle.follow(loss_of(model[index](tokens(3, 5)))).backward()
        run.step()
    assert [layer.step.item() for layer in model] == [2, 2]
    assert load_stats(model)["1"].load.sum() == 0


# The corners: no choice, no tokens, no balance.


@pytest.mark.parametrize("experts", [1, 5])
def test_no_choice_no_update(make, method, experts):
    """With K = E every load is the same by construction, and there is no (K+1)-th expert."""
    run = Run(make(method, num_experts=experts, top_k=experts))
    before = settled(run)
    run.backward(tokens(3, 7))
    run.step()
    same(settled(run), before)
    stats = load_stats(run.layer)[""]
    assert stats.load.tolist() == [21] * experts
    assert (stats.max_vio, stats.entropy) == pytest.approx((0, 1))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_no_tokens_no_update(make, method, shape):
    run = Run(make(method, shared_experts=1))
    before = settled(run)
    y = run.backward(tokens(*shape))
    assert y.shape == (*shape, D)
    run.step()
    same(settled(run), before)
    assert load_stats(run.layer)[""].load.tolist() == [0] * E


def test_only_padding_is_no_tokens(make, method):
    run = Run(make(method))
    before = settled(run)
    run.backward(tokens(3, 5), torch.zeros(3, 5, dtype=torch.bool))
    assert not any(grad.any() for grad in run.gradients().values())
    run.step()
    same(settled(run), before)


def test_all_tokens_to_one_expert(make, method):
    """Idle experts get a gradient of zeros, not none; the state leans against the one that has all."""
    run = Run(make(method, top_k=1))
    with torch.no_grad():
        weight = run.layer.router.weight
        weight.copy_(-50 * torch.eye(*weight.shape)).index_fill_(0, torch.tensor([2]), 50.0)
    run.backward(tokens(3, 5).abs())
    before = settled(run)
    assert run.counts()["demand_E"][:E].tolist() == [0, 0, 15, 0, 0]
    gradient = run.layer.experts.gate_up.grad
    assert [bool(expert.any()) for expert in gradient] == [False, False, True, False, False]
    run.step()
    for name, bias_E in settled(run).items():
        chooses = bias_E.dim() == 1 and not name.endswith("last_step_E")
        assert not chooses or int((bias_E - before[name]).argmin()) == 2


def test_forced_balance_moves_no_bias(make, method):
    """Equal loads are equal: a mean that is no whole number in floating point must not tilt the bias."""
    run = Run(make(method))
    before = settled(run)
    with override(run.layer, forced_balance):
        run.backward(tokens(5, 7))
    assert run.counts()["demand_E"][:E].tolist() == [14] * E
    run.step()
    biases = {name: value for name, value in settled(run).items() if name.startswith("balancers.bias.")}
    same(biases, {name: before[name] for name in biases})


# Router mathematics.


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "half"])
def test_router_math_is_fp32(make, method, how):
    """Logits are those of fp32 copies, to the last bit; so are the weights, and experts chosen from them."""
    dtype = {"autocast": torch.float32, "bfloat16": torch.bfloat16, "half": torch.float16}[how]
    layer, seen = make(method).to(dtype), []
    x = tokens(3, 5).to(dtype)

    def look(call, scores, selector):
        seen.extend([scores, selector(call, scores)])
        return seen[1]

    with override(layer, look), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        layer(x)
    scores, routing = seen
    logit_TE = x.view(-1, D).float() @ layer.router.weight.float().T
    assert torch.equal(scores.logit_TE, logit_TE) or not layer.router.weight.requires_grad
    copied = copy.deepcopy(layer).float()
    exact = copied.scorer(copied.call(x.float(), None))
    for name in ("logit_TE", "prob_TE", "gate_TE"):
        assert torch.equal(getattr(scores, name), getattr(exact, name))
    assert {t.dtype for t in (scores.prob_TE, scores.gate_TE, scores.choice_TE, routing.weight_N)} == {torch.float32}
    assert {t.dtype for t in (routing.load_E, routing.dropped_E, routing.token_N, routing.expert_N)} == {torch.int64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_model_learns_in_full_precision(make, method, dtype):
    """A bias that is fp32 takes steps that bf16 would swallow; its counts are the routing's."""
    layer = make(method).to(dtype)
    run = Run(layer)
    before = settled(run)
    run.backward(tokens(3, 5).to(dtype))
    same(run.counts()["demand_E"], layer.routing.demand_E())
    run.step()
    assert any(not torch.equal(v, before[k]) for k, v in settled(run).items()) == bool(METHODS[method].state)
