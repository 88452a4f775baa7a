import math

import pytest
import torch
import torch.nn.functional as F

from equipoise.config import ModelConfig
from equipoise.errors import UserError
from equipoise.methods import METHODS
from equipoise.models.decoder import Decoder, loss
from equipoise.routing import SCORERS
from equipoise.routing.softmax import Softmax

V = 23
SIZES = {"dim": 20, "num_layers": 3, "num_heads": 5, "hidden_dim": 7, "num_experts": 5, "top_k": 2, "shared_experts": 1}


def build(max_seq_len=None, dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    config = ModelConfig(**{**SIZES, "dense_layers": 1, "method": "unbalanced", **changes})
    return Decoder(config, V, max_seq_len).to(dtype)


def tokens(*shape, seed=1):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


# The decoder once more, of one sequence, in plain loops.


def reference(model, token_S, window):
    x = model.embedding.weight[token_S]
    for layer in model.layers:
        x = x + reference_attention(layer.attention, normed(x), window)
        h = normed(x)
        x = x + (
            reference_moe(layer.moe, h) if layer.moe else swiglu(h, layer.dense.gate_up.weight, layer.dense.down.weight)
        )
    return normed(x) @ model.embedding.weight.T


def normed(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def reference_attention(attention, x, window):
    half = attention.channels // 2
    query, key, value = (x @ attention.qkv.weight.T).view(len(x), 3, attention.num_heads, 2 * half).unbind(1)
    query, key = (torch.complex(z[..., :half], z[..., half:]) for z in (query, key))
    speed = torch.tensor([10000 ** (-pair / half) for pair in range(half)], dtype=x.dtype)
    y = torch.zeros_like(value)
    for head in range(attention.num_heads):
        for s in range(len(x)):
            seen = range(max(0, s - window + 1), s + 1)
            turn = [torch.polar(torch.ones_like(speed), (s - p) * speed) for p in seen]
            score = torch.stack([(query[s, head] * key[p, head].conj() * turn[p - seen[0]]).sum().real for p in seen])
            y[s, head] = (score / math.sqrt(2 * half)).softmax(0) @ value[seen, head]
    return y.flatten(1) @ attention.out.weight.T


def reference_moe(moe, x):
    prob = (x @ moe.router.weight.T).softmax(-1)
    y = swiglu(x, moe.shared.gate_up.weight, moe.shared.down.weight)
    for t in range(len(x)):
        chosen = prob[t].argsort(descending=True)[:2].tolist()
        for e in chosen:
            y[t] += prob[t, e] / prob[t, chosen].sum() * swiglu(x[t], moe.experts.gate_up[e], moe.experts.down[e])
    return y


def swiglu(x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (gate / (1 + (-gate).exp()) * up) @ down.T


@pytest.mark.parametrize("max_seq_len", [None, 7, 3])
def test_equals_the_plain_reference(max_seq_len):
    model, token_BS = build(max_seq_len), tokens(2, 7)
    with torch.no_grad():
        logit_BSV = model(token_BS)
        for token_S, logit_SV in zip(token_BS, logit_BSV):
            torch.testing.assert_close(logit_SV, reference(model, token_S, max_seq_len or 7), atol=1e-12, rtol=0)


def test_no_token_sees_a_later_one():
    model, token_BS = build().eval(), tokens(1, 7)
    changed = token_BS.clone()
    changed[0, 4] = (changed[0, 4] + 1) % V
    before, after = model(token_BS), model(changed)
    torch.testing.assert_close(after[:, :4], before[:, :4], atol=1e-12, rtol=0)
    assert ((after - before)[0, 4:].abs().amax(1) > 1e-3).all()


def test_the_window_forgets():
    """In one layer, a token is read by max_seq_len positions, its own among them."""
    model, token_BS = build(3, num_layers=1).eval(), tokens(1, 7)
    changed = token_BS.clone()
    changed[0, 1] = (changed[0, 1] + 1) % V
    difference_S = (model(changed) - model(token_BS))[0].abs().amax(1)
    assert (difference_S > 1e-6).tolist() == [False, True, True, True, False, False, False]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_starts_from_the_same_weights(method):
    model, other = build(method=method), build(method="unbalanced")
    weights, others = dict(model.named_parameters()), dict(other.named_parameters())
    own = (".router.", ".experts.") if METHODS[method].pool else (".router.",)  # may be wider, or no parameter
    for name, weight in others.items():
        if not any(part in name for part in own) or (name in weights and weights[name].shape == weight.shape):
            assert torch.equal(weights[name], weight), name


def test_a_method_that_draws_numbers_of_its_own_starts_from_the_same_weights(monkeypatch):
    class Drawing(Softmax):
        def __init__(self, num_experts):
            super().__init__(num_experts)
            self.centroid_E = torch.nn.Parameter(torch.rand(num_experts))

    expected = dict(build().named_parameters())
    monkeypatch.setitem(SCORERS, "softmax", Drawing)
    weights = dict(build().named_parameters())
    assert set(weights) - set(expected) == {"layers.1.moe.scorer.centroid_E", "layers.2.moe.scorer.centroid_E"}
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_each_weight_has_draws_of_its_own():
    weights = [weight.flatten() for weight in build().parameters() if weight.dim() > 1]
    ratios = {round((weight[1] / weight[0]).item(), 6) for weight in weights}
    assert len(ratios) == len(weights) == 19


def test_another_seed_gives_other_weights():
    for (name, weight), other in zip(build().named_parameters(), build(seed=1).parameters()):
        assert torch.equal(weight, other) == ("norm" in name), name


def test_initial_variance_is_one_over_the_inputs_and_residual_outputs_are_scaled_down():
    model = build(dim=140, num_heads=7, hidden_dim=71, num_experts=11)
    dense, moe, attention = model.layers[0].dense, model.layers[1].moe, model.layers[2].attention
    full = {"embedding": model.embedding.weight, "qkv": attention.qkv.weight, "router": moe.router.weight}
    full |= {"gate_up": moe.experts.gate_up, "dense": dense.gate_up.weight, "shared": moe.shared.gate_up.weight}
    small = {
        "out": attention.out.weight,
        "down": moe.experts.down,
        "dense": dense.down.weight,
        "shared": moe.shared.down.weight,
    }
    for weights, scale in ((full, 1), (small, 6**-0.5)):
        for name, weight in weights.items():
            spread = weight.std().item() * weight.shape[-1] ** 0.5 / scale
            assert abs(spread - 1) < 4 / math.sqrt(weight.numel()), name


def test_layers_are_named_and_the_embedding_is_the_head():
    model = build()
    assert [(layer.dense is None, layer.moe is None) for layer in model.layers] == [
        (False, True),
        (True, False),
        (True, False),
    ]
    assert type(model.get_submodule("layers.1.moe")).__name__ == "MoE"
    assert model.layers[0].dense.down.in_features == 14
    assert [name for name, weight in model.named_parameters() if V in weight.shape] == ["embedding.weight"]


def test_a_noisy_router_starts_without_a_preference_for_any_noise():
    """Its second matrix is zero at first, as the method says, and not drawn like the first."""
    routers = [layer.moe.router for layer in build(method="importance_load").layers if layer.moe is not None]
    assert all(not router.noise.any() and router.weight.all() for router in routers)
    plain = [layer.moe.router for layer in build().layers if layer.moe is not None]
    assert all(torch.equal(router.weight, other.weight) for router, other in zip(routers, plain, strict=True))


def test_padding_on_the_right_changes_nothing():
    model, token_BS = build(), tokens(2, 7)
    mask_BS = torch.ones(2, 7, dtype=torch.bool)
    mask_BS[1, 4:] = False
    padded = model(token_BS, mask_BS=mask_BS)
    assert [layer.moe.routing.load_E.sum().item() for layer in model.layers[1:]] == [22, 22]
    torch.testing.assert_close(padded[1, :4], model(token_BS[1:, :4])[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(padded[0], model(token_BS[:1])[0], atol=1e-12, rtol=0)


def test_autocast_trains_near_fp32():
    model, token_BS = build(dtype=torch.float32, dim=40, num_layers=2), tokens(3, 11)
    exact = loss(model(token_BS), token_BS.roll(-1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        logit_BSV = model(token_BS)
        rounded = loss(logit_BSV, token_BS.roll(-1, 1))
    assert (logit_BSV.dtype, rounded.dtype) == (torch.bfloat16, torch.float32)
    assert abs(rounded.item() - exact.item()) < 0.02
    rounded.backward()
    gradients = [weight.grad for weight in model.parameters()]
    exact_gradients = torch.autograd.grad(exact, list(model.parameters()))
    for gradient, expected in zip(gradients, exact_gradients):
        assert F.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.97


def test_learns_a_sequence_by_heart():
    model, token_BS = build(dtype=torch.float32), tokens(2, 13)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        value = loss(model(token_BS[:, :-1]), token_BS[:, 1:])
        value.backward()
        optimizer.step()
    assert value.item() < 0.05


def test_loss_is_nats_per_token_and_leaves_out_minus_100():
    logit_BSV = torch.tensor([[[0.0, 0.0, 0.0], [math.log(2), 0.0, math.log(5)]]], dtype=torch.float64)
    assert loss(logit_BSV, torch.tensor([[1, 0]])).item() == pytest.approx((math.log(3) + math.log(4)) / 2, abs=1e-15)
    assert loss(logit_BSV, torch.tensor([[-100, 2]])).item() == pytest.approx(math.log(8 / 5), abs=1e-15)
    coarse = torch.randn(5, 7, 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    target_BS = torch.zeros(5, 7, dtype=torch.int64)
    assert torch.equal(loss(coarse, target_BS), loss(coarse.float(), target_BS))


def test_settings_reach_the_layers():
    model = build(set=("top_k.capacity_factor=0.5", "top_k.drop=position", "top_k.renormalize=false"))
    for layer in model.layers[1:]:
        chosen = {"top_k.capacity_factor": 0.5, "top_k.drop": "position", "top_k.renormalize": False}
        assert layer.moe.settings.items() >= chosen.items()
    with pytest.raises(UserError, match=r"top_k.capacity_factor=.5 has no valid value"):
        build(set=("top_k.capacity_factor=.5",))


def test_misuse_is_refused():
    model = build()
    with torch.no_grad(), pytest.raises(UserError, match="holds 5 positions, not 6"):
        model(tokens(1, 6), model.cache(1, 5))
    with pytest.raises(UserError, match="multiple of 2 \\* num_heads"):
        build(num_heads=4)
    with pytest.raises(UserError, match="max_seq_len must be above 0"):
        build(max_seq_len=0)
