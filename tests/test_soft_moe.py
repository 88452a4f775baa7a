import jaxtyping
import pytest
import torch
from torch.nn.functional import silu

from equipoise import SoftMoE, UserError

SIZES = {"dim": 7, "hidden_dim": 3, "num_experts": 5, "slots_per_expert": 2}


def layer(**changes):
    torch.manual_seed(1)
    return SoftMoE(**{**SIZES, **changes}).double()


def inputs(*shape, seed=2):
    return torch.randn(*shape, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_loop(moe, x_SD):
    """The paper's equations for one sequence, slot by slot and token by token."""
    phi = [column / column.norm() for column in moe.phi.T] if moe.scale is not None else list(moe.phi.T)
    scale = moe.scale if moe.scale is not None else 1.0
    rows = [token / token.norm() for token in x_SD] if moe.scale is not None else list(x_SD)
    logit = torch.stack([torch.stack([scale * (row @ column) for column in phi]) for row in rows])
    answers = []
    for slot in range(logit.shape[1]):
        share = logit[:, slot].exp() / logit[:, slot].exp().sum()
        mixed = sum(weight * token for weight, token in zip(share, x_SD))
        expert = slot // moe.slots_per_expert
        gate, up = (moe.experts.gate_up[expert] @ mixed).chunk(2)
        answers.append(moe.experts.down[expert] @ (silu(gate) * up))
    outputs = []
    for row in logit:
        share = row.exp() / row.exp().sum()
        outputs.append(sum(weight * answer for weight, answer in zip(share, answers)))
    return torch.stack(outputs)


@pytest.mark.parametrize("changes", [{}, {"normalize": False}, {"slots_per_expert": 1}, {"num_experts": 1}])
def test_it_is_the_papers_layer(changes):
    """Outputs, and the gradients of everything, against the loops."""
    moe, x = layer(**changes), inputs(3, 4)
    y, expected = moe(x), torch.stack([by_loop(moe, sequence) for sequence in x])
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    weights = list(moe.parameters())
    gradients = [torch.autograd.grad(outputs.square().sum(), weights) for outputs in (y, expected)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_gradients_agree_with_finite_differences():
    moe = layer(kernel="naive")
    mask = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.autograd.gradcheck(lambda x: moe(x, mask), inputs(2, 3).requires_grad_())


def test_shares_sum_to_one():
    dispatch, combine = layer().mixtures(inputs(3, 4), None)
    torch.testing.assert_close(dispatch.sum(1), torch.ones(3, 10).double())
    torch.testing.assert_close(combine.sum(2), torch.ones(3, 4).double())


@pytest.mark.parametrize("fill", [0.0, 1e3, float("nan"), float("inf")])
def test_padding_changes_nothing(fill):
    moe, x = layer(), inputs(3, 4).requires_grad_()
    longer, mask = torch.full((3, 9, 7), fill, dtype=torch.float64), torch.zeros(3, 9, dtype=torch.bool)
    longer[:, 2:6], mask[:, 2:6] = x.detach(), True
    longer.requires_grad_()
    y, padded = moe(x), moe(longer, mask)
    torch.testing.assert_close(padded[mask].view_as(y), y, rtol=1e-12, atol=1e-12)
    assert not padded[~mask].any()
    (plain,) = torch.autograd.grad(y.square().sum(), x)
    (hidden,) = torch.autograd.grad(padded.square().sum(), longer)
    torch.testing.assert_close(hidden[mask].view_as(x), plain, rtol=1e-9, atol=1e-12)
    assert not hidden[~mask].any()


def test_a_sequence_of_padding_is_answered_with_zeros():
    moe, x = layer(), inputs(2, 4)
    mask = torch.tensor([[True] * 4, [False] * 4])
    y = moe(x, mask)
    y.square().sum().backward()
    assert not y[1].any()
    assert all(parameter.grad.isfinite().all() for parameter in moe.parameters())
    torch.testing.assert_close(y[0], moe(x[:1])[0], rtol=1e-12, atol=1e-12)


def test_sequences_do_not_mix_and_tokens_may_be_permuted():
    moe, x = layer(), inputs(3, 4)
    y, order = moe(x), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(moe(x[1]), y[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moe(x[:, order]), y[:, order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moe(x.view(1, 3, 4, 7)), y.view(1, 3, 4, 7), rtol=1e-12, atol=1e-12)


def test_the_scale_of_tokens_changes_no_mixture():
    """That is what the normalisation is for."""
    x = inputs(1, 4)
    for normalize in (True, False):
        moe = layer(normalize=normalize)
        same = [torch.allclose(a, b) for a, b in zip(moe.mixtures(x, None), moe.mixtures(9 * x, None))]
        assert same == [normalize] * 2


def test_later_tokens_matter_so_evaluation_wants_to_be_asked_for():
    moe, x = layer(), inputs(1, 6)
    assert not torch.allclose(moe(x)[:, :3], moe(x[:, :3]))
    assert not SoftMoE.causal
    with pytest.raises(UserError, match="evaluation='as_trained'"):
        moe.eval()(x)
    bidirectional = layer(evaluation="as_trained")
    assert torch.equal(bidirectional.eval()(x), bidirectional.train()(x))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_tokens(shape):
    assert layer()(inputs(*shape)).shape == (*shape, 7)


def test_mixtures_are_fp32_under_autocast_and_in_bfloat16():
    moe, x = layer().float(), inputs(2, 4).float()
    plain = moe.mixtures(x, None)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(moe.mixtures(x, None), plain):
            assert torch.equal(ours, theirs)
        torch.testing.assert_close(moe(x).float(), moe.float()(x).float(), rtol=0.05, atol=0.05)
    assert moe.bfloat16().mixtures(x.bfloat16(), None)[0].dtype == torch.float32
    assert moe(x.bfloat16()).dtype == torch.bfloat16


@pytest.fixture
def unchecked():
    """Without the checks of annotations, which only tests have: what a user meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("x", "mask", "words"),
    [
        (torch.zeros(2, 4, 6), None, r"\[\.\.\., S, 7\], not torch.float32 \[2, 4, 6\]"),
        (torch.zeros(7), None, r"not torch.float32 \[7\]"),
        (torch.zeros(4, 7, dtype=torch.int64), None, "floating-point tokens.*not torch.int64"),
        (torch.zeros(2, 4, 7), torch.ones(4, 2, dtype=torch.bool), r"mask must be bool \[2, 4\].*\[4, 2\]"),
        (torch.zeros(2, 4, 7), torch.ones(2, 4), "mask must be bool.*not torch.float32"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_refused(x, mask, words):
    with pytest.raises(UserError, match=words):
        layer().float()(x, mask)


def test_no_parameter_is_a_scalar():
    """FSDP2 could not shard it."""
    assert all(parameter.dim() for parameter in layer().parameters())


@pytest.mark.parametrize(
    "changes", [{"dim": 0}, {"num_experts": 0}, {"slots_per_expert": 0}, {"evaluation": "top_k"}, {"kernel": "fast"}]
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        layer(**changes)
