from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from equipoise import MoE, UserError, attach, share_experts
from equipoise.config import ModelConfig, TrainConfig
from equipoise.models.decoder import Decoder, loss
from equipoise.training import checkpoint
from equipoise.training.flops import Ledger
from equipoise.training.loop import train
from equipoise.training.sampling import load_run
from tiny_runs import parts, write_text

V = 23
SIZES = {"dim": 20, "num_layers": 4, "num_heads": 5, "hidden_dim": 7, "num_experts": 5, "top_k": 2, "dense_layers": 1}


def layers(count=3, **changes):
    torch.manual_seed(0)
    sizes = {"dim": 7, "hidden_dim": 3, "num_experts": 5, "top_k": 2, "method": "unipool", **changes}
    return nn.ModuleList([MoE(**sizes) for _ in range(count)])


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return Decoder(ModelConfig(**{**SIZES, "method": "unipool", **changes}), V)


def tokens():
    return torch.randint(V, (3, 11), generator=torch.Generator().manual_seed(1))


def step(model, optimizer):
    handle = attach(model, optimizer)
    optimizer.zero_grad()
    handle.follow(loss(model(tokens()), tokens())).backward()
    optimizer.step()
    handle.remove()


def test_every_layer_has_the_same_experts_once_among_the_parameters_and_its_own_router():
    model = layers()
    assert share_experts(model) is model[0].experts
    assert {id(layer.experts) for layer in model} == {id(model[0].experts)}
    assert len({id(layer.router) for layer in model}) == 3
    names = [name for name, _ in model.named_parameters() if ".experts." in name]
    assert names == ["0.experts.gate_up", "0.experts.down"]


def test_the_pool_learns_from_all_layers():
    model = layers()
    share_experts(model)
    gradients = []
    for layer in model:
        layer.eval()(torch.randn(11, 7, generator=torch.Generator().manual_seed(2))).square().sum().backward()
        gradients.append(model[0].experts.down.grad.clone())
    assert all(not torch.equal(one, other) for one, other in pairwise(gradients))
    alone = layers()[2]
    alone.experts.load_state_dict(model[0].experts.state_dict())
    alone.eval()(torch.randn(11, 7, generator=torch.Generator().manual_seed(2))).square().sum().backward()
    torch.testing.assert_close(gradients[2] - gradients[1], alone.experts.down.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes", [{"num_experts": 7}, {"hidden_dim": 5}])
def test_experts_of_another_size_are_refused_and_nothing_is_shared(changes):
    one, other = layers(1)[0], layers(1, **changes)[0]
    before = other.experts
    with pytest.raises(UserError, match="number or size"):
        share_experts([one, other])
    assert other.experts is before
    with pytest.raises(UserError, match="no layer"):
        share_experts([])


# In the decoder.


def test_the_decoders_pool_is_as_large_as_the_experts_of_all_its_layers_would_be():
    model, plain = build(), build(method="unbalanced")
    pool = model.layers[1].moe.experts
    assert [layer.moe.experts is pool for layer in model.layers[1:]] == [True] * 3
    assert [layer.moe.num_experts for layer in model.layers[1:]] == [15] * 3
    experts = [sum(p.numel() for n, p in m.named_parameters() if ".experts." in n) for m in (model, plain)]
    assert experts[0] == experts[1]
    once = [name for name, _ in model.named_parameters() if ".experts." in name]
    assert once == ["layers.1.moe.experts.gate_up", "layers.1.moe.experts.down"]


def test_the_optimizer_has_the_pool_once_and_a_step_moves_it():
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    count = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    assert count == sum(parameter.numel() for parameter in model.parameters())
    before = model.layers[1].moe.experts.down.detach().clone()
    step(model, optimizer)
    assert not torch.equal(model.layers[3].moe.experts.down, before)


def test_a_file_holds_the_pool_once_and_fills_every_layer(tmp_path):
    model = build()
    checkpoint.export_weights(model, tmp_path / "weights.safetensors")
    saved = load_file(tmp_path / "weights.safetensors")
    assert [name for name in saved if ".experts." in name] == [
        f"layers.1.moe.experts.{weight}" for weight in ("down", "gate_up")
    ]
    other = build(seed=5)
    load_model(other, tmp_path / "weights.safetensors")
    assert other.layers[1].moe.experts is other.layers[3].moe.experts
    assert torch.equal(other.eval()(tokens()), model.eval()(tokens()))


def test_a_checkpoint_holds_the_pool_and_its_price_once_each(tmp_path):
    model, other = build(), build(seed=5)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (model, other)]
    step(model, optimizers[0])
    tensors = checkpoint.flatten(model, optimizers[0])
    assert len([name for name in tensors if name.startswith("model.") and ".experts." in name]) == 2
    checkpoint.save(tmp_path, 1, tensors, {}, keep=1)
    checkpoint.load(tmp_path, checkpoint.flatten(other, optimizers[1]))
    assert other.layers[2].moe.balancers["pool_loss"].price_E.any()
    for _ in range(2):
        step(model, optimizers[0]), step(other, optimizers[1])
    for one, same in zip(model.state_dict().values(), other.state_dict().values()):
        assert torch.equal(one, same)


def test_a_row_costs_one_expert_of_the_pool():
    model = build()
    ledger = Ledger.of(model, 11)
    assert ledger.row == (2 * (20 * 14 + 7 * 20),) * 3
    assert ledger.token.router == 3 * 2 * 20 * 15
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens())
    rows = [int(layer.moe.routing.load_E.sum()) for layer in model.layers[1:]]
    assert ledger.forward_flops(33, rows).total == counter.get_total_flops()


def test_centroids_cost_what_a_router_costs():
    """A step does too: their sums are a product of the size that the router's gradient would be."""
    model = build(method="kmeans")
    assert Ledger.of(model, 11).token == Ledger.of(build(method="unbalanced"), 11).token
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        handle = attach(model, [])
        handle.follow(loss(model(tokens()), tokens())).backward()
    rows = [int(layer.moe.routing.load_E.sum()) for layer in model.layers[1:]]
    assert Ledger.of(model, 11).step_flops(33, rows).total == counter.get_total_flops()


@pytest.mark.parametrize("method", ["unipool", "kmeans", "relu"])
def test_a_run_trains_and_comes_back(tmp_path, method):
    text, model = write_text(tmp_path / "text"), {"method": method}
    train(TrainConfig(**parts(text, tmp_path / "out", model=model, steps=3, tensorboard=False)))
    model, _ = load_run(tmp_path / "out")
    saved = load_file(next((tmp_path / "out").glob("*.safetensors")))
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in saved.items())
    assert method != "unipool" or len(own) > len(saved)
