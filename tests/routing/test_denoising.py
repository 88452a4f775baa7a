import jaxtyping
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from equipoise import MoE, UserError, attach, denoising, override, replay
from equipoise.routing.denoising import SCHEDULES, experts_by_ratio

SIZES = {"dim": 7, "hidden_dim": 3, "num_experts": 5, "top_k": 2, "method": "expert_choice", "kernel": "loop"}
DYNAMIC = {"per": "sequence", "schedule": "linear", "k_min": 1, "k_max": 4, "evaluation": "as_trained"}


def mean_k(schedule, k_min, k_max, sigma=0.22):
    """The mean K over ratios that are uniform in [0, 1]."""
    ratio_B = (torch.arange(100_000) + 0.5) / 100_000
    return experts_by_ratio(ratio_B, schedule, k_min, k_max, sigma).double().mean().item()


@pytest.mark.parametrize("schedule", ["linear", "linear_reverse", "cosine", "cosine_reverse"])
@pytest.mark.parametrize(("k_min", "k_max", "mean"), [(8, 32, 20), (2, 14, 8)])
def test_the_mean_is_that_of_a_constant_k(schedule, k_min, k_max, mean):
    assert mean_k(schedule, k_min, k_max) == pytest.approx(mean, abs=1e-3)


def test_the_gaussian_matches_at_the_default_width():
    """The specification's figures: 20.03 at 0.22, 19.3 at the authors' default of 0.2."""
    assert mean_k("gaussian", 8, 32) == pytest.approx(20.03, abs=0.02)
    assert mean_k("gaussian", 8, 32, sigma=0.2) == pytest.approx(19.3, abs=0.05)
    assert mean_k("gaussian_reverse", 8, 32) == pytest.approx(40 - 20.03, abs=0.02)


@pytest.mark.parametrize(
    ("schedule", "ends"),
    [
        ("linear", (8, 20, 32)),
        ("linear_reverse", (32, 20, 8)),
        ("cosine", (8, 20, 32)),
        ("cosine_reverse", (32, 20, 8)),
        ("gaussian", (8, 32, 8)),
        ("gaussian_reverse", (32, 8, 32)),
    ],
)
def test_start_middle_and_end(schedule, ends):
    k_B = experts_by_ratio(torch.tensor([0.0, 0.5, 1.0]), schedule, 8, 32, 0.22)
    assert tuple(k_B.tolist()) == ends
    assert schedule in SCHEDULES


def test_the_widest_and_the_narrowest_bell():
    """A parabola, also in fp32, and a spike."""
    ratio_B = torch.linspace(0, 1, 101)
    parabola_B = (8 + 24 * (1 - 4 * (ratio_B.double() - 0.5) ** 2)).round().long()
    assert torch.equal(experts_by_ratio(ratio_B, "gaussian", 8, 32, 999.0), parabola_B)
    spike_B = torch.full_like(parabola_B, 8)
    spike_B[50] = 32
    assert torch.equal(experts_by_ratio(ratio_B, "gaussian", 8, 32, 1e-3), spike_B)


def test_k_is_monotone_in_the_ratio():
    ratio_B = torch.linspace(0, 1, 101)
    for schedule, order in (("linear", 1), ("cosine", 1), ("linear_reverse", -1), ("cosine_reverse", -1)):
        assert (order * experts_by_ratio(ratio_B, schedule, 2, 14, 0.22).diff() >= 0).all()


def layer(**settings):
    torch.manual_seed(1)
    return MoE(**SIZES, **{**DYNAMIC, **settings}).double()


def rows_by_sequence(layer, length):
    routing = layer.routing
    return torch.bincount(routing.token_N[routing.expert_N < 5] // length, minlength=3).tolist()


def test_each_sequence_gets_the_k_of_its_ratio():
    """K = 1, 2 (2.5 to the even) and 4 of 10 tokens for each of 5 experts; outside the block K is the layer's."""
    x, moe = torch.randn(3, 10, 7, dtype=torch.float64), layer()
    with denoising(moe, torch.tensor([0.0, 0.5, 1.0])):
        moe(x)
    assert rows_by_sequence(moe, 10) == [10, 20, 40]
    moe(x)
    assert rows_by_sequence(moe, 10) == [20, 20, 20]


def test_the_number_of_rows_is_static():
    x, moe = torch.randn(3, 10, 7, dtype=torch.float64), layer()
    sizes = set()
    for ratios in ([0.0, 0.0, 0.0], [1.0, 0.3, 0.7]):
        with denoising(moe, torch.tensor(ratios)):
            moe(x, torch.rand(3, 10) < 0.8)
        sizes.add(len(moe.routing.token_N))
    assert sizes == {3 * 5 * (10 * 4 // 5)}


def test_a_sequence_alone_is_routed_as_in_its_batch_and_batches_may_be_permuted():
    x, moe, ratio_B = torch.randn(3, 10, 7, dtype=torch.float64), layer(), torch.tensor([0.9, 0.1, 0.5])
    order = torch.tensor([2, 0, 1])
    with denoising(moe, ratio_B):
        whole = moe(x)
    with denoising(moe, ratio_B[order]):
        torch.testing.assert_close(moe(x[order]), whole[order], rtol=1e-12, atol=1e-12)
    for index in range(3):
        with denoising(moe, ratio_B[index : index + 1]):
            torch.testing.assert_close(moe(x[index : index + 1])[0], whole[index], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_is_recomputed_with_its_ratios(reentrant):
    """In the backward pass, after the block."""
    gradients = []
    for wrapped in (False, True):
        moe, x = layer(), torch.randn(3, 10, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        handle = attach(moe, ())
        with denoising(moe, torch.tensor([0.0, 0.5, 1.0])):
            y = checkpoint(moe, x.requires_grad_(), use_reentrant=reentrant) if wrapped else moe(x)
        handle.follow(y.square().mean()).backward()
        gradients.append((moe.router.weight.grad, moe.window.sums["demand_E"]))
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=0)


def test_replay_holds_the_rows_of_every_sequence():
    moe, x = layer(), torch.randn(3, 10, 7, dtype=torch.float64)
    with denoising(moe, torch.tensor([0.0, 0.5, 1.0])):
        y = moe(x)
    with override(moe, replay(moe.routing)):
        torch.testing.assert_close(moe(x), y, rtol=1e-12, atol=1e-12)


def test_blocks_nest_and_end_with_errors():
    moe, outer, inner = layer(), torch.zeros(3), torch.ones(3)
    with denoising(moe, outer):
        with denoising(moe, inner):
            assert moe.ratio_B is inner
        assert moe.ratio_B is outer
    with pytest.raises(UserError, match="3 sequences"), denoising(moe, torch.zeros(2)):
        moe(torch.randn(3, 10, 7, dtype=torch.float64))
    assert moe.ratio_B is None


@pytest.fixture
def unchecked():
    """Without the checks of annotations, which only tests have: what a user meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    "ratio_B",
    [
        0.5,
        [0.5],
        torch.tensor([1, 0]),
        torch.tensor(0.5),
        torch.zeros(1, 3),
        torch.tensor([0.5, 1.01]),
        torch.tensor([-0.1, 0.5]),
        torch.tensor([0.5, float("nan")]),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_are_no_ratios_is_refused(ratio_B):
    with pytest.raises(UserError, match="ratio"), denoising(layer(), ratio_B):
        pass


def test_ratios_may_come_from_another_device():
    """Such as the CPU; "meta" stands for a GPU here."""
    moe = layer().to("meta")
    with denoising(moe, torch.tensor([0.0, 0.5, 1.0])):
        assert moe(torch.zeros(3, 10, 7, dtype=torch.float64, device="meta")).shape == (3, 10, 7)


def test_a_model_without_layers_is_refused():
    with pytest.raises(UserError, match="no MoE layer"), denoising(torch.nn.Linear(2, 2), torch.zeros(1)):
        pass


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"schedule": "quadratic"}, "unknown"),
        ({"k_max": None}, "k_min=1 and k_max=None"),
        ({"k_min": 5}, "k_min=5 and k_max=4"),
        ({"k_max": 6}, "num_experts=5"),
        ({"per": "call"}, "per='sequence'"),
        ({"schedule": None}, "for a schedule"),
        ({"sigma": 0.0, "schedule": "gaussian"}, "sigma=0.0 .* 0.001"),
        ({"sigma": 9e-4, "schedule": "gaussian_reverse"}, "sigma=0.0009 "),
        ({"sigma": 1e3, "schedule": "gaussian"}, "sigma=1000.0 "),
        ({"sigma": float("nan"), "schedule": "gaussian"}, "sigma=nan "),
        ({"sigma": 0.3}, "sigma is for the Gaussian schedules"),
        ({"sigma": 0.3, "schedule": None, "k_min": None, "k_max": None}, "sigma is for the Gaussian schedules"),
        ({"per": "batch"}, "'call' or 'sequence'"),
    ],
)
def test_impossible_schedules_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        layer(**settings)
