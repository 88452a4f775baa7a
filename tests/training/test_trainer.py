import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from equipoise.config import TrainConfig
from equipoise.errors import UserError
from equipoise.methods import METHODS
from equipoise.models.decoder import Decoder, loss
from equipoise.training.run import World
from equipoise.training.schedule import learning_rate
from equipoise.training.text import read_text
from equipoise.training.trainer import Trainer
from tiny_runs import parts, write_text

ALONE = World(0, 1, torch.device("cpu"))
FALL_BACK = {name: (f"{row.selector}.evaluation=top_k",) for name, row in METHODS.items() if not row.causal}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def trainer(text: Path):
    """Makes a trainer of a tiny run."""

    def make(method: str = "loss_free", *, model: dict = {}, **settings) -> Trainer:  # noqa: B006
        model = {"method": method, "set": FALL_BACK.get(method, ())} | model
        budget = {} if "flops" in settings else {"steps": 11}
        config = TrainConfig(**budget | parts(text, Path("unused"), model=model, **settings))
        return Trainer(config, ALONE, read_text(config.data, config.optimizer, config.seed))

    return make


# What some methods cannot share: a router of centroids, one with null experts, one pool of experts and its router.
OWN = {"kmeans": ("router",), "adamoe": ("router",), "unipool": ("router", "experts")}


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def test_every_method_starts_from_the_same_weights_and_sees_the_same_batches(trainer) -> None:
    all_of_them = [trainer(method) for method in METHODS]
    first = all_of_them[0]
    for other in all_of_them[1:]:
        ours, theirs = weights(first), weights(other)
        differing = {name for name in ours if name not in theirs or not torch.equal(ours[name], theirs[name])}
        own = OWN.get(other.config.model.method, ())
        assert all(not set(name.split(".")).isdisjoint(own) for name in differing)
        for step in (0, 3, 10):
            for mine, its in zip(first.text.train.batch(step), other.text.train.batch(step)):
                assert torch.equal(mine, its)
    another = trainer(seed=1)
    assert not torch.equal(weights(first)["embedding.weight"], weights(another)["embedding.weight"])
    assert not torch.equal(first.text.train.batch(0)[0], another.text.train.batch(0)[0])


def test_a_step_is_adamw_with_warm_up_clipping_and_no_decay_of_norms(trainer) -> None:
    """Against the same written with torch's plain parts."""
    ours = trainer("unbalanced", optimizer={"clip": 0.5, "weight_decay": 0.3, "betas": (0.8, 0.9)})
    config = ours.config.optimizer
    torch.manual_seed(0)
    model = Decoder(ours.config.model, 256)
    decays, others = ([w for w in model.parameters() if (w.dim() > 1) == matrix] for matrix in (True, False))
    groups = [{"params": decays, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, (step + 1) / 11)
        token_BS, _ = ours.text.train.batch(step)
        expected = loss(model(token_BS[:, :-1]), token_BS[:, 1:])
        optimizer.zero_grad()
        expected.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        found = ours.step()
        assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert found["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert found["gradient_norm"] > 0.5
        assert found["learning_rate"] == learning_rate(config, (step + 1) / 11)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weights(ours)[name], weight.detach(), rtol=1e-4, atol=1e-6)
    assert (ours.done, ours.tokens) == (3, 3 * 4 * 16)


@pytest.mark.parametrize(
    ("method", "invariant"), [("unbalanced", True), ("loss_free", True), ("quantile", True), ("switch", False)]
)
def test_micro_batches_add_up_to_one_batch(trainer, method: str, invariant: bool) -> None:
    """In fp64, where only a method whose loss is one micro-batch's own differs."""
    split = [trainer(method, optimizer={"grad_accumulation": micros}) for micros in (1, 4)]
    values: list = []
    for each in split:
        each.model.double()
        found = [each.step() for _ in range(3)]
        values.append([{key: step[key] for key in ("loss", "gradient_norm", "max_vio")} for step in found])
    one, four = (weights(each) for each in split)
    differences = [float((one[name] - four[name]).abs().max()) for name in one]
    assert (max(differences) < 1e-9) is invariant
    close = all(one == pytest.approx(four, rel=1e-9) for one, four in zip(*values))
    assert close is invariant
    assert [each.tokens for each in split] == [192, 192]
    assert split[0].flops == split[1].flops
    if invariant:
        loads = [[layer.window.last["demand_E"].tolist() for layer in each.layers.values()] for each in split]
        assert loads[0] == loads[1]
        assert values[0][-1]["max_vio"] == sum(max(load) * len(load) / sum(load) - 1 for load in loads[0]) / 2


def test_flops_are_those_of_the_ledger_and_equal_for_all_that_drop_no_row(trainer) -> None:
    spent = {}
    same_router = [name for name, row in METHODS.items() if row.scorer != "noisy" and not row.pool]
    exact = [name for name in same_router if METHODS[name].selector in ("top_k", "expert_choice")]
    for method in exact:
        each = trainer(method)
        for _ in range(2):
            each.step()
        spent[method] = each.flops
    # Per token and layer: qkv, out and attention over 16 positions; router; 2 experts of 3 matrices. Then the head.
    per_token = 2 * (2 * 4 * 16 * 16 + 4 * 16 * 16 + 2 * 16 * 4 + 2 * 2 * 3 * 16 * 16) + 2 * 16 * 256
    step = 3 * per_token * 4 * 16
    assert spent == dict.fromkeys(exact, 2 * step)  # 64 tokens divide by 4 experts, also in expert choice


@pytest.mark.parametrize("method", ["loss_free", "expert_choice"])
@pytest.mark.parametrize("steps", [0.1, 0.6, 3.4, 3.6, 7.0])
def test_a_flop_budget_is_spent_to_half_a_step(trainer, method: str, steps: float) -> None:
    """With 7 experts, expert choice leaves rows free: its steps are cheaper, and there may be more of them."""
    model = {"num_experts": 7}
    probe = trainer(model=model)
    step_flops = probe.ledger.per_token().total * probe.step_tokens
    each = trainer(method, model=model, flops=steps * step_flops)
    expected = each.steps
    rates = []
    while not each.finished:
        rates.append(each.step()["learning_rate"])
    assert abs(each.flops - steps * step_flops) <= 0.5 * step_flops or each.done == 1
    assert expected <= each.done <= expected + 1
    assert each.steps == each.done == len(rates)
    if method == "loss_free":
        assert each.done == max(1, round(steps))
        assert each.flops == each.done * step_flops
        assert rates[-1] == each.config.optimizer.min_learning_rate


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_in_both_precisions(trainer, method: str) -> None:
    found = {}
    for dtype in ("fp32", "bf16"):
        each = trainer(method, dtype=dtype, steps=20, optimizer={"learning_rate": 0.02, "warmup": 0.0})
        found[dtype] = [each.step()["loss"] for _ in range(20)]
        assert all(weight.dtype == torch.float32 for weight in each.model.parameters())
        assert found[dtype][0] == pytest.approx(math.log(256), rel=0.1)
        assert found[dtype][-1] < 3.6
        assert each.evaluate().loss < 3.6
    assert found["bf16"] != found["fp32"]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.05)


def test_a_model_without_experts_trains(trainer) -> None:
    each = trainer(model={"dense_layers": 2})
    assert each.step()["max_vio"] == 0
    assert each.flops == 3 * (2 * (2 * 4 * 16 * 16 + 4 * 16 * 16 + 2 * 3 * 32 * 16) + 2 * 16 * 256) * 64
    assert each.evaluate().per_layer() == []


@pytest.mark.parametrize(
    ("broken", "place"),
    [
        ("embedding.weight", "layer layers.0.moe: The router's logits hold NaN"),
        ("layers.0.attention.out.weight", "layer layers.0.moe: The router's logits hold NaN"),
        ("layers.0.moe.experts.down", "layer layers.1.moe: The router's logits hold NaN"),
        ("layers.1.moe.router.weight", "layer layers.1.moe: The router's logits hold NaN"),
        ("layers.1.moe.experts.down", "gradient of norm.weight: the loss is nan; lower the learning rate."),
        ("norm.weight", "gradient of norm.weight: the loss is nan; lower the learning rate."),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_names_step_and_layer_and_leaves_the_weights(trainer, broken: str, place: str, value: float) -> None:
    each = trainer()
    for _ in range(2):
        each.step()
    with torch.no_grad():
        each.model.get_parameter(broken).fill_(value)
    before = weights(each)
    with pytest.raises(UserError) as caught:
        each.step()
    assert str(caught.value).startswith(f"Step 3, {place}")
    assert each.done == 2
    assert all(torch.equal(before[name], now) or name == broken for name, now in weights(each).items())
    with pytest.raises(UserError) as caught:
        each.evaluate()
    there = place if "layer " in place else ": the validation loss is nan; lower the learning rate."
    assert there in str(caught.value)
    assert str(caught.value).startswith("Step 2")


@pytest.mark.parametrize(
    ("spoilt", "place", "norm"),
    [
        ({"layers.1.attention.out.weight": math.inf}, "layers.1.attention.out.weight", "inf"),
        ({"layers.0.moe.experts.down": math.nan}, "layers.0.moe.experts.down", "nan"),
        (
            {"layers.0.moe.experts.down": math.nan, "layers.1.attention.out.weight": math.inf},
            "layers.1.attention.out.weight",
            "nan",
        ),
        (
            {"layers.0.moe.experts.down": math.inf, "layers.1.attention.out.weight": math.nan},
            "layers.1.attention.out.weight",
            "nan",
        ),
    ],
)
def test_a_broken_gradient_names_where_it_began(trainer, spoilt: dict[str, float], place: str, norm: str) -> None:
    """Backward spreads an overflow to all that comes before, so the last one is where it began."""
    each = trainer()
    each.step()
    before = weights(each)
    for name, value in spoilt.items():
        each.model.get_parameter(name).register_hook(lambda grad, value=value: grad * value)
    with pytest.raises(UserError) as caught:
        each.step()
    assert str(caught.value) == f"Step 2, gradient of {place}: the gradient's norm is {norm}; lower the learning rate."
    assert all(torch.equal(before[name], now) for name, now in weights(each).items())


def test_a_perplexity_beyond_all_floats_is_refused(trainer) -> None:
    each = trainer()
    with torch.no_grad():
        each.model.norm.weight.fill_(3e5)
    with pytest.raises(UserError, match=r"^Step 0: the validation loss is [0-9.e+]+; lower the learning rate\.$"):
        each.evaluate()


def test_a_method_that_cannot_be_evaluated_is_refused_before_it_trains(trainer) -> None:
    with pytest.raises(UserError, match="evaluation='top_k'"):
        trainer("expert_choice", model={"set": ()})


def test_evaluation_changes_nothing(trainer) -> None:
    watched, alone = trainer(), trainer()
    for _ in range(3):
        watched.step()
        first, second = watched.evaluate(), watched.evaluate()
        assert first.loss == second.loss
        assert all(torch.equal(first.domain_load[name], second.domain_load[name]) for name in first.domain_load)
        alone.step()
    assert all(torch.equal(*pair) for pair in zip(weights(watched).values(), weights(alone).values()))
    assert all(torch.equal(*pair) for pair in itertools.zip_longest(watched.model.buffers(), alone.model.buffers()))
    assert watched.flops == alone.flops
