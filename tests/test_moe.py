import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from equipoise import MoE, NonFiniteError, Routing, UserError
from hand_made import attach_still

SIZES = {"dim": 7, "hidden_dim": 5, "num_experts": 5, "top_k": 2}


@pytest.fixture
def unchecked():
    """Without the checks of annotations, which only tests have: what a user meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def swiglu(x_D, gate_up, down):
    gate_F, up_F = (gate_up @ x_D).chunk(2)
    return down @ (F.silu(gate_F) * up_F)


def by_tokens(layer, x_TD, score, renormalize, bias_E=0.0):
    """The layer's answer to each token by itself."""
    y = []
    for x_D in x_TD:
        gate_E = score(layer.router.weight @ x_D)
        experts = (gate_E + bias_E).argsort(descending=True)[: layer.top_k].tolist()
        total = sum(gate_E[e] for e in experts) if renormalize else 1
        answers = [gate_E[e] / total * swiglu(x_D, layer.experts.gate_up[e], layer.experts.down[e]) for e in experts]
        if layer.shared is not None:
            answers.append(swiglu(x_D, layer.shared.gate_up.weight, layer.shared.down.weight))
        y.append(sum(answers))
    return torch.stack(y)


def gradients(layer, y, grad):
    layer.zero_grad()
    y.backward(grad)
    return {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize("shared_experts", [0, 2])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("method", ["unbalanced", "loss_free"])
def test_outputs_and_gradients_are_those_of_each_token_by_itself(method, top_k, shared_experts):
    layer = MoE(**{**SIZES, "top_k": top_k}, method=method, shared_experts=shared_experts).double()
    attach_still(layer)
    bias_E = torch.zeros(5)
    if method == "loss_free":
        bias_E = layer.balancers["bias"].bias_E.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0, -0.4]))
    score = torch.sigmoid if method == "loss_free" else lambda logit_E: logit_E.softmax(0)
    x = torch.randn(3, 11, 7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    y = layer(x)
    ours = gradients(layer, y, grad) | {"x": x.grad.clone()}
    x.grad = None
    expected_y = by_tokens(layer, x.flatten(0, 1), score, top_k > 1, bias_E).view_as(x)
    expected = gradients(layer, expected_y, grad) | {"x": x.grad}
    torch.testing.assert_close(y, expected_y, rtol=1e-10, atol=1e-12)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_expert_choice_is_each_expert_with_the_tokens_it_took():
    layer = MoE(**SIZES, method="expert_choice").double()
    x = torch.randn(11, 7, dtype=torch.float64)
    prob_TE = (x @ layer.router.weight.T).softmax(1)
    expected = torch.zeros_like(x)
    for e in range(5):
        for t in prob_TE[:, e].argsort(descending=True)[: 11 * 2 // 5].tolist():
            expected[t] += prob_TE[t, e] * swiglu(x[t], layer.experts.gate_up[e], layer.experts.down[e])
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


def mixtral():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    return MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=7, intermediate_size=5, num_local_experts=5, num_experts_per_tok=2)
    ), {"method": "unbalanced"}


def olmoe():
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    config = OlmoeConfig(hidden_size=7, intermediate_size=5, num_experts=5, num_experts_per_tok=2, norm_topk_prob=False)
    return OlmoeSparseMoeBlock(config), {"method": "unbalanced", "renormalize": False}


def deepseek():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    sizes = {"hidden_size": 7, "moe_intermediate_size": 5, "n_routed_experts": 5, "num_experts_per_tok": 2}
    config = DeepseekV3Config(**sizes, n_group=1, topk_group=1, routed_scaling_factor=1.0, n_shared_experts=2)
    return DeepseekV3MoE(config), {"method": "loss_free", "shared_experts": 2}


@pytest.mark.parametrize("make", [mixtral, olmoe, deepseek])
def test_outputs_and_gradients_are_transformers(make):
    block, settings = make()
    block.experts.config._experts_implementation = "eager"
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    block, layer = block.double(), MoE(**SIZES, **settings).double()
    attach_still(layer)
    twins = {
        "router.weight": "gate.weight",
        "experts.gate_up": "experts.gate_up_proj",
        "experts.down": "experts.down_proj",
    }
    ours, theirs = dict(layer.named_parameters()), dict(block.named_parameters())
    for mine, other in twins.items():
        ours[mine].data.copy_(theirs[other].data)
    if layer.shared is not None:
        dense = block.shared_experts
        ours["shared.gate_up.weight"].data.copy_(torch.cat([dense.gate_proj.weight, dense.up_proj.weight]))
        ours["shared.down.weight"].data.copy_(dense.down_proj.weight)
        block.gate.e_score_correction_bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0, -0.4]))
        layer.balancers["bias"].bias_E.copy_(block.gate.e_score_correction_bias)
    x, other_x = (torch.randn(3, 11, 7, dtype=torch.float64).requires_grad_() for _ in range(2))
    other_x.data.copy_(x.data)
    grad = torch.randn_like(x)
    y, other_y = layer(x), block(other_x)
    y.backward(grad)
    other_y.backward(grad)
    # transformers' routers are fp32 inside, whatever dtype the model has.
    torch.testing.assert_close(y, other_y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, other_x.grad, rtol=1e-5, atol=1e-6)
    for mine, other in twins.items():
        torch.testing.assert_close(ours[mine].grad, theirs[other].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "mask", "words"),
    [
        (torch.zeros(3, 6), None, r"\[\.\.\., 7\], not torch.float32 \[3, 6\]"),
        (torch.zeros(()), None, r"not torch.float32 \[\]"),
        (torch.zeros(3, 7, dtype=torch.int64), None, "floating-point tokens.*not torch.int64"),
        (torch.zeros(3, 7), torch.ones(2, dtype=torch.bool), r"mask must be bool \[3\].*not torch.bool \[2\]"),
        (torch.zeros(2, 3, 7), torch.ones(6, dtype=torch.bool), r"mask must be bool \[2, 3\].*not torch.bool \[6\]"),
        (torch.zeros(3, 7), torch.ones(3), "mask must be bool.*not torch.float32"),
        (torch.zeros(3, 7), torch.ones(3, dtype=torch.int64), "mask must be bool.*not torch.int64"),
        (torch.full((3, 7), torch.nan), None, "NaN or infinity"),
        (torch.zeros(3, 7, dtype=torch.float64), None, "float64.*float32"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused_in_one_sentence(x, mask, words):
    with pytest.raises(UserError, match=words) as error:
        MoE(**SIZES, shared_experts=1)(x, mask)
    assert str(error.value).endswith(".")
    assert ". " not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 6}, "top_k=6 must lie between 1 and num_experts=5"),
        ({"top_k": 0}, "top_k=0 must lie"),
        ({"dim": 0}, "dim=0 is impossible"),
        ({"hidden_dim": -1}, "hidden_dim=-1 is impossible"),
        ({"num_experts": 0}, "num_experts=0 is impossible"),
        ({"shared_experts": -1}, "shared_experts=-1 is impossible"),
        ({"kernel": "cuda"}, "Unknown kernel 'cuda'.*auto, naive, loop, grouped_mm"),
        ({"method": "lossfree"}, "did you mean 'loss_free'"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"z_loss": float("nan")}, "z_loss"),
        ({"weight": -1.0}, "weight"),
        ({"capacity_factor": float("nan")}, "capacity_factor"),
        ({"method": "loss_free", "rate": -1.0}, "rate"),
        ({"method": "quantile", "bins": 0}, "bins"),
        ({"method": "quantile", "ema": 1.0}, "ema"),
        ({"top_k": 1, "renormalize": True}, "renormalize=True with top_k=1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_an_impossible_layer_is_refused_when_it_is_made(changes, words):
    with pytest.raises(UserError, match=words) as error:
        MoE(**{**SIZES, **changes})
    assert ". " not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("training", [True, False])
def test_logits_that_are_not_finite_name_their_layer(value, training):
    layer, x = MoE(**SIZES).train(training), torch.randn(3, 7)
    x[1, 2] = value
    with pytest.raises(NonFiniteError) as error:
        layer(x)
    assert error.value.layer is layer


def test_padding_may_hold_anything_and_is_answered_with_zeros():
    layer, mask = MoE(**SIZES, method="unbalanced", shared_experts=1), torch.arange(11) % 3 > 0
    x = torch.randn(11, 7).masked_fill(~mask[:, None], torch.nan).requires_grad_()
    y = layer(x, mask)
    y.square().sum().backward()
    assert y[~mask].eq(0).all()
    assert x.grad[~mask].eq(0).all()
    torch.testing.assert_close(y[mask], layer(x[mask]))


@pytest.mark.parametrize("kernel", ["naive", "loop", "grouped_mm"])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (1,), (), (2, 3, 5)])
def test_any_leading_shape(shape, kernel):
    layer = MoE(dim=8, hidden_dim=4, num_experts=5, top_k=2, method="switch", shared_experts=1, kernel=kernel)
    attach_still(layer)
    x, mask = torch.randn(*shape, 8), torch.ones(shape, dtype=torch.bool)
    y = layer(x, mask)
    assert y.shape == x.shape
    torch.testing.assert_close(y.flatten(0, -2) if shape else y[None], layer(x.reshape(-1, 8)))
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    if x.numel() == 0:
        assert all(parameter.grad.eq(0).all() for parameter in layer.parameters())


def test_an_expert_without_tokens_gets_a_gradient_of_zero_and_the_others_do_not():
    layer = MoE(**SIZES, method="unbalanced")
    layer.router.weight.data[2] = -100
    layer(torch.rand(11, 7)).sum().backward()
    assert layer.routing.load_E[2] == 0
    for parameter in layer.experts.parameters():
        used = parameter.grad.flatten(1).abs().sum(1) > 0
        assert torch.equal(used, layer.routing.load_E > 0)


def test_shared_experts_add_one_dense_expert_of_their_width():
    layer, x = MoE(**SIZES, method="unbalanced", shared_experts=3), torch.randn(11, 7)
    routed = MoE(**SIZES, method="unbalanced")
    routed.load_state_dict({name: value for name, value in layer.state_dict().items() if "shared" not in name})
    assert layer.shared.down.weight.shape == (7, 15)
    torch.testing.assert_close(layer(x) - routed(x), layer.shared(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["loop", "grouped_mm"])
def test_autocast_routes_as_fp32_does_and_computes_in_bf16(kernel):
    layer = MoE(dim=16, hidden_dim=8, num_experts=5, top_k=2, method="unbalanced", kernel=kernel)
    x = torch.randn(11, 16)
    exact, routing = layer(x), layer.routing
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(layer.routing.expert_N, routing.expert_N)
    assert torch.equal(layer.routing.weight_N, routing.weight_N)
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=3e-2 * exact.abs().max().item())


@pytest.mark.parametrize(("dtype", "weights"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_a_cast_layer_answers_in_its_dtype_with_weights_in_at_least_fp32(dtype, weights):
    layer, x = MoE(**SIZES, method="unbalanced").to(dtype), torch.randn(11, 7).to(dtype)
    y = layer(x)
    assert (y.dtype, layer.routing.weight_N.dtype) == (dtype, weights)
    exact = by_tokens(layer.double(), x.double(), lambda logit_E: logit_E.softmax(0), True)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=torch.finfo(dtype).eps * 8 * exact.abs().max().item())


@pytest.mark.parametrize("kernel", ["loop", "grouped_mm"])
@pytest.mark.parametrize("tensors", ["meta", "fake"])
def test_shapes_are_known_without_data(tensors, kernel):
    with torch.device("meta") if tensors == "meta" else FakeTensorMode():
        layer = MoE(dim=16, hidden_dim=8, num_experts=5, top_k=2, method="unbalanced", kernel=kernel)
        y = layer(torch.randn(3, 11, 16))
        y.sum().backward()
    assert y.shape == (3, 11, 16)
    assert layer.experts.gate_up.grad.shape == (5, 16, 16)


def test_the_last_routing_is_kept_without_a_graph():
    layer = MoE(**SIZES, method="unbalanced")
    assert layer.routing is None
    layer(torch.randn(11, 7))
    assert isinstance(layer.routing, Routing)
    assert layer.routing.load_E.sum() == 22
    assert not layer.routing.weight_N.requires_grad


def test_the_state_holds_parameters_bias_and_steps_and_nothing_else():
    keys = {"step", "router.weight", "experts.gate_up", "experts.down"}
    shared = {"shared.gate_up.weight", "shared.down.weight"}
    assert set(MoE(**SIZES, z_loss=1e-3).state_dict()) == keys
    assert set(MoE(**SIZES, method="loss_free", shared_experts=1).state_dict()) == (
        keys | shared | {f"balancers.bias.{name}" for name in ("bias_E", "last_step_E", "overshoots")}
    )
    assert set(MoE(**SIZES, method="quantile").state_dict()) == keys | {"balancers.quantile.bias_E"}


def test_its_representation_tells_its_sizes_and_its_method():
    text = repr(MoE(**SIZES, method="loss_free"))
    for words in ("dim=7", "hidden_dim=5", "num_experts=5", "top_k=2", "loss_free"):
        assert words in text
