import re

import pytest
import safetensors.torch
import torch
from torch import nn

from equipoise.errors import UserError
from equipoise.training import checkpoint
from training.checkpoint_cases import bits, blank, names, no_file_above, three, values


def test_round_trip_is_exact_to_the_bit(tmp_path):
    tensors, state = values(), {"data": {"position": 2**60, "text": "\u00e9\ud800"}, "loss": [0.1, -0.0, 1e-310, None]}
    path = checkpoint.save(tmp_path / "new" / "folder", 123, tensors, state, keep=1)
    assert path == tmp_path / "new" / "folder" / "step-00000123"
    assert names(path) == ["checkpoint.json", "shard-00001-model-00001-of-00001.safetensors"]
    filled = blank(tensors)
    loaded = checkpoint.load(tmp_path / "new" / "folder", filled)
    assert bits(filled) == bits(tensors)
    assert loaded == checkpoint.Loaded(123, state, path, (), ())


def test_the_newest_are_kept_and_leftovers_removed(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    (tmp_path / ".tmp-step-00000001").mkdir()
    (tmp_path / ".tmp-step-00000001" / "part").write_bytes(b"left by a killed process")
    (tmp_path / "step-by-step.md").write_text("not a checkpoint")
    for step in (9, 99_999_999, 100_000_000):
        checkpoint.save(tmp_path, step, values(), {}, keep=2)
    assert names(tmp_path) == ["step-100000000", "step-99999999", "step-by-step.md"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-100000000"


def test_a_save_replaces_its_step_and_drops_later_ones(tmp_path):
    three(tmp_path)
    checkpoint.save(tmp_path, 5, values(11), {"again": True}, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000005"]
    filled = blank(values())
    assert checkpoint.load(tmp_path, filled).state == {"again": True}
    assert bits(filled) == bits(values(11))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model.new": torch.zeros(1), "model.other": torch.zeros(1)}, "lacks the tensor model.new, and 1 more"),
        ({"model.weight": None}, "has the tensor model.weight, and 0 more, without a place"),
        ({"model.weight": torch.zeros(5, 7)}, "has model.weight as torch.float32 (7, 5), not torch.float32 (5, 7)"),
        (
            {"model.weight": torch.zeros(7, 5).double()},
            "has model.weight as torch.float32 (7, 5), not torch.float64 (7, 5)",
        ),
        ({"model.count": torch.zeros(1, dtype=torch.int64)}, "has model.count as torch.int64 (), not torch.int64 (1,)"),
        ({"rng.0.cpu": None}, "has the tensor rng.0.cpu, and 0 more, without a place"),
        ({"rng.0.cuda": torch.zeros(1)}, "lacks the tensor rng.0.cuda, and 0 more"),
    ],
)
def test_a_checkpoint_that_does_not_fit_fills_nothing(change, reason, tmp_path):
    checkpoint.save(tmp_path, 3, values(3), {}, keep=1)
    wanted = {name: tensor for name, tensor in (values() | change).items() if tensor is not None}
    before = bits(wanted)
    with pytest.raises(UserError, match=re.escape(f"step-00000003 {reason}; start in")):
        checkpoint.load(tmp_path, wanted)
    assert bits(wanted) == before


def test_random_states_may_differ_if_inexact_is_allowed(tmp_path):
    checkpoint.save(tmp_path, 3, values(3), {}, keep=1)
    wanted = values() | {"rng.0.cuda": torch.full((16,), 7, dtype=torch.uint8)}
    del wanted["rng.0.cpu"]
    assert checkpoint.load(tmp_path, wanted, allow_inexact=True).unrestored == ("rng.0.cuda",)
    assert wanted["rng.0.cuda"].tolist() == [7] * 16
    assert bits({"model.weight": wanted["model.weight"]}) == bits({"model.weight": values(3)["model.weight"]})


class Tied(nn.Module):
    """Tied weights, dropout, a count, and a parameter that never gets a gradient."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.hidden = nn.Linear(5, 5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, token_T: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.head(nn.functional.dropout(self.hidden(self.embedding(token_T)).relu(), 0.3)).square().sum()


def build(seed: int, amsgrad: bool = False) -> tuple[Tied, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    model = Tied()
    own = dict(model.named_parameters())
    first = [own.pop("hidden.weight"), own.pop("hidden.bias")]
    return model, [torch.optim.AdamW(first, 1e-2, amsgrad=amsgrad), torch.optim.AdamW(own.values(), 3e-2)]


def train(model: Tied, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    for _ in range(steps):
        model(torch.arange(11)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("steps", [0, 3])
def test_a_resumed_run_continues_to_the_bit(steps, tmp_path):
    straight, optimizers = build(0, amsgrad=True)
    train(straight, optimizers, steps + 4)

    model, optimizers = build(0, amsgrad=True)
    train(model, optimizers, steps)
    tensors = checkpoint.flatten(model, *optimizers) | checkpoint.rng_tensors()
    checkpoint.save(tmp_path, steps, tensors, {}, keep=1)

    resumed, optimizers = build(1, amsgrad=True)
    tensors = checkpoint.flatten(resumed, *optimizers) | checkpoint.rng_tensors()
    checkpoint.load(tmp_path, tensors)
    checkpoint.restore_rng(tensors)
    train(resumed, optimizers, 4)
    assert resumed.head.weight is resumed.embedding.weight
    assert resumed.count == steps + 4
    assert bits(resumed.state_dict()) == bits(straight.state_dict())


def test_names_of_a_flat_model():
    model, optimizers = build(0, amsgrad=True)
    parameters = ["embedding.weight", "hidden.bias", "hidden.weight", "unused"]
    expected = {f"model.{name}" for name in [*parameters, "frozen", "count"]}
    expected |= {f"optimizer.{name}.{key}" for name in parameters for key in ("step", "exp_avg", "exp_avg_sq")}
    expected |= {f"optimizer.hidden.{name}.max_exp_avg_sq" for name in ("weight", "bias")}
    assert set(checkpoint.flatten(model, *optimizers)) == expected


def test_state_is_made_as_adam_makes_it_and_without_a_step():
    model, optimizers = build(0, amsgrad=True)
    steps = []
    for optimizer in optimizers:
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
    made = checkpoint.flatten(model, *optimizers)
    assert steps == []
    assert all(not made[name].any() for name in made if name.startswith("optimizer."))
    model, optimizers = build(0, amsgrad=True)
    train(model, optimizers, 1)
    for name, tensor in checkpoint.flatten(model, *optimizers).items():
        assert (made[name].dtype, made[name].shape, made[name].device) == (tensor.dtype, tensor.shape, tensor.device)


def test_other_optimizers_and_their_limits():
    model = nn.Linear(3, 2)
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(3)).sum().backward()
    sgd.step()
    flat = checkpoint.flatten(model, sgd)
    assert flat["optimizer.weight.momentum_buffer"].tolist() == [[1.0] * 3] * 2
    with pytest.raises(UserError, match="AdamW has a parameter that is not the model's"):
        checkpoint.flatten(model, torch.optim.AdamW([nn.Parameter(torch.ones(1))]))
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=1)
    lbfgs.step(lambda: model(torch.ones(3)).sum())
    with pytest.raises(UserError, match="Cannot save LBFGS: its state 'func_evals' is not a tensor"):
        checkpoint.flatten(model, lbfgs)


def test_exported_weights_load_with_safetensors_alone(tmp_path):
    model, _ = build(0)
    path = tmp_path / "model.safetensors"
    checkpoint.export_weights(model, path)
    assert set(safetensors.torch.load_file(path)) == {
        "embedding.weight", "hidden.weight", "hidden.bias", "unused", "frozen", "count"
    }  # fmt: skip
    other, _ = build(1)
    assert safetensors.torch.load_model(other, path) == (set(), [])
    assert bits(other.state_dict()) == bits(model.state_dict())
    before = path.read_bytes()
    with no_file_above(100), pytest.raises(UserError, match=re.escape(f"weights to {path}: File too large")):
        checkpoint.export_weights(other, path)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["model.safetensors"]
