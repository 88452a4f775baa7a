import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ot.smooth import SparsityConstrained, get_plan_from_semi_dual, semi_dual_obj_grad, smooth_ot_semi_dual
from scipy.optimize import linprog
from torch.optim import Adam

from equipoise.errors import UserError
from equipoise.routing.expert_choice import ExpertChoice
from equipoise.routing.sparse_transport import SparseTransport, semi_dual, sparse_plan
from equipoise.routing.top_k import TopK
from hand_made import call_of, check_order, dense, scores_of


def plan_of(price_T, similarity_ET, capacity, gamma):
    """The plan [T, E] as a table."""
    mass = price_T.new_tensor(similarity_ET.shape[1] / len(similarity_ET))
    kept_C = torch.ones(capacity, dtype=torch.bool)
    token_EC, _, plan_EC = sparse_plan(price_T, similarity_ET, mass, kept_C, gamma)
    return torch.zeros_like(similarity_ET).scatter(1, token_EC, plan_EC).T


def theirs(price_T, similarity_ET, capacity, gamma):
    """Value, gradient and plan of the library's own semi-dual."""
    num_experts, num_tokens = similarity_ET.shape
    given = np.ones(num_tokens), np.full(num_experts, num_tokens / num_experts), -similarity_ET.T.numpy()
    regularisation = SparsityConstrained(capacity, gamma)
    value, gradient = semi_dual_obj_grad(price_T.numpy(), *given, regularisation)
    return value, gradient, get_plan_from_semi_dual(price_T.numpy(), *given[1:], regularisation)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 23), st.integers(1, 5), st.sampled_from([0.03, 1.0, 30.0]), st.integers(0, 99), st.data())
def test_value_gradient_and_plan_are_those_of_another_library(num_tokens, num_experts, gamma, seed, data):
    capacity, generator = data.draw(st.integers(1, num_tokens - 1)), torch.Generator().manual_seed(seed)
    similarity_ET = torch.randn(num_experts, num_tokens, generator=generator, dtype=torch.float64).softmax(0)
    price_T = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    ones = torch.ones(num_tokens, dtype=torch.float64), torch.ones(capacity, dtype=torch.bool)
    value, gradient_T = semi_dual(price_T, similarity_ET, *ones, gamma)
    expected_value, expected_gradient, expected_plan = theirs(price_T, similarity_ET, capacity, gamma)
    plan_TE = plan_of(price_T, similarity_ET, capacity, gamma)
    assert value.item() == pytest.approx(expected_value, rel=1e-10)
    np.testing.assert_allclose(gradient_T.numpy(), expected_gradient, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(plan_TE.numpy(), expected_plan, rtol=1e-9, atol=1e-10)
    assert ((plan_TE > 0).sum(0) <= capacity).all()
    torch.testing.assert_close(plan_TE.sum(0), torch.full((num_experts,), num_tokens / num_experts).double())


def test_the_gradient_is_that_of_the_value():
    similarity_ET = torch.randn(3, 11, dtype=torch.float64).softmax(0)
    price_T = torch.randn(11, dtype=torch.float64)
    ones = torch.ones(11, dtype=torch.float64), torch.ones(5, dtype=torch.bool)
    _, gradient_T = semi_dual(price_T, similarity_ET, *ones, 1.0)
    for token in range(11):
        nudge_T = torch.zeros(11).double().index_fill(0, torch.tensor([token]), 1e-6)
        up, down = (semi_dual(price_T + sign * nudge_T, similarity_ET, *ones, 1.0)[0] for sign in (1, -1))
        assert ((up - down) / 2e-6).item() == pytest.approx(gradient_T[token].item(), abs=1e-6)


def test_one_place_per_column_is_plain_transport_and_a_constant():
    """Each expert gives all it has to one token: the semi-dual of the linear program, less gamma/2 per unit squared."""
    similarity_ET, price_T = torch.randn(3, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    ones = torch.ones(7, dtype=torch.float64)
    value, _ = semi_dual(price_T, similarity_ET, ones, torch.ones(1, dtype=torch.bool), 1.0)
    linear = price_T.sum() - 7 / 3 * (price_T + similarity_ET).amax(1).sum()
    torch.testing.assert_close(value, linear + 3 * (7 / 3) ** 2 / 2)


@pytest.mark.filterwarnings("ignore:scipy.optimize:DeprecationWarning")  # the other library's
def test_all_places_are_quadratic_transport():
    similarity_ET = torch.randn(3, 7, dtype=torch.float64).softmax(0)
    call = call_of(similarity_ET.T.contiguous(), 2)
    selector = SparseTransport(3, capacity_factor=2.0, multiple=1, solver="lbfgs")
    price_T = selector.prices(call, similarity_ET, torch.ones(7, dtype=torch.bool))
    plan_TE = plan_of(price_T, similarity_ET, 7, 1.0)
    expected = smooth_ot_semi_dual(
        np.ones(7), np.full(3, 7 / 3), -similarity_ET.T.numpy(), 1.0, reg_type="l2", stopThr=1e-12
    )
    np.testing.assert_allclose(plan_TE.numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(plan_TE.sum(1).numpy(), np.ones(7), atol=1e-4)


def test_the_exact_solver_bounds_the_cost_and_adam_stays_below():
    """The highest semi-dual lies below the regularised cost of any plan; 20 steps climb from 0, but not as high."""
    similarity_ET = (2 * torch.randn(4, 32, dtype=torch.float64)).softmax(0)
    call, kept_C = call_of(similarity_ET.T.contiguous(), 1), torch.ones(8, dtype=torch.bool)
    values = {}
    for name in ("lbfgs", "adam"):
        price_T = SparseTransport(4, solver=name).prices(call, similarity_ET, kept_C)
        values[name] = semi_dual(price_T, similarity_ET, torch.ones(32).double(), kept_C, 1.0)[0].item()
    start = semi_dual(torch.zeros(32).double(), similarity_ET, torch.ones(32).double(), kept_C, 1.0)[0].item()
    rows = np.vstack([np.kron(np.eye(32), np.ones((1, 4))), np.kron(np.ones((1, 32)), np.eye(4))])
    whole = linprog(-similarity_ET.T.numpy().ravel(), A_eq=rows, b_eq=[1] * 32 + [8] * 4, bounds=(0, 1))
    assert start < values["adam"] < values["lbfgs"] <= whole.fun + 16 + 1e-9  # the corner has 32 entries of 1
    assert values["lbfgs"] == pytest.approx(whole.fun + 16, abs=5e-3)


def test_adam_is_torchs():
    similarity_ET = torch.randn(5, 23, dtype=torch.float64).softmax(0)
    kept_C, ones = torch.ones(8, dtype=torch.bool), torch.ones(23, dtype=torch.float64)
    price_T = SparseTransport(5).prices(call_of(similarity_ET.T.contiguous(), 1), similarity_ET, kept_C)
    expected_T = torch.zeros(23, dtype=torch.float64, requires_grad=True)
    optimizer = Adam([expected_T], lr=1e-2)
    for _ in range(20):
        expected_T.grad = -semi_dual(expected_T.detach(), similarity_ET, ones, kept_C, 1.0)[1]
        optimizer.step()
    torch.testing.assert_close(price_T, expected_T.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("k", "factor", "multiple", "capacity"), [(1, 1.0, 4, 8), (2, 1.0, 1, 10), (2, 1.5, 4, 16)])
def test_experts_take_the_largest_entries_of_their_column(k, factor, multiple, capacity):
    score_TE = torch.randn(23, 5, dtype=torch.float64).softmax(1)
    selector = SparseTransport(5, capacity_factor=factor, multiple=multiple)
    call = call_of(score_TE, k)
    routing = selector(call, scores_of(score_TE))
    check_order(routing)
    assert routing.load_E.tolist() == [capacity] * 5
    similarity_ET = score_TE.T.contiguous()
    price_T = selector.prices(call, similarity_ET, torch.ones(capacity, dtype=torch.bool))
    plan_TE = plan_of(price_T, similarity_ET, capacity, 1.0)
    weight_TE, chosen_TE = dense(routing, 23)
    assert chosen_TE[plan_TE > 0].all()
    torch.testing.assert_close(weight_TE, score_TE * chosen_TE)


def test_prices_cover_tokens_that_expert_choice_leaves_out():
    score_TE = torch.randn(1024, 16, generator=torch.Generator().manual_seed(0)).softmax(1)
    call, scores = call_of(score_TE, 1), scores_of(score_TE)

    def uncovered(selector):
        return 1 - dense(selector(call, scores), 1024)[1].any(1).double().mean()

    assert uncovered(ExpertChoice(16)) > 0.2
    assert uncovered(SparseTransport(16)) < uncovered(ExpertChoice(16)) / 2


@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_padding_is_not_taken_and_moves_no_price(solver):
    score_TE, mask_T = torch.rand(23, 5, dtype=torch.float64), torch.arange(23) % 3 > 0
    selector = SparseTransport(5, solver=solver)
    garbage_TE = torch.where(mask_T[:, None], score_TE, 9.0)
    padded = dense(selector(call_of(garbage_TE, 2, mask_T), scores_of(garbage_TE)), 23)
    alone = dense(selector(call_of(score_TE[mask_T], 2), scores_of(score_TE[mask_T])), int(mask_T.sum()))
    for actual, expected in zip(padded, alone):
        torch.testing.assert_close(actual[mask_T], expected)
        assert not actual[~mask_T].any()


@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
@pytest.mark.parametrize("mask_T", [None, torch.zeros(7, dtype=torch.bool)])
def test_without_real_tokens_nobody_takes_anything(solver, mask_T):
    score_TE = torch.rand(0 if mask_T is None else 7, 5)
    routing = SparseTransport(5, solver=solver)(call_of(score_TE, 2, mask_T), scores_of(score_TE))
    assert routing.load_E.eq(0).all()
    assert routing.weight_N.eq(0).all()


def test_evaluation_is_refused_unless_a_fall_back_is_named():
    score_TE = torch.rand(17, 5)
    evaluation = call_of(score_TE, 2, training=False), scores_of(score_TE)
    with pytest.raises(UserError, match=r"evaluation='top_k'.*'as_trained'"):
        SparseTransport(5)(*evaluation)
    fallen, plain = SparseTransport(5, evaluation="top_k")(*evaluation), TopK(5, renormalize=False)(*evaluation)
    assert torch.equal(fallen.expert_N, plain.expert_N)
    assert torch.equal(fallen.weight_N, plain.weight_N)
    selector = SparseTransport(5, evaluation="as_trained")
    trained = selector(call_of(score_TE, 2), scores_of(score_TE))
    assert torch.equal(selector(*evaluation).token_N, trained.token_N)


def test_planned_rows_are_what_experts_take():
    selector, score_TE = SparseTransport(5, capacity_factor=1.5), torch.rand(1000, 5)
    assert selector.planned_rows(5, 2) == 3.0
    assert selector(call_of(score_TE, 2), scores_of(score_TE)).load_E.sum() == 3000


@pytest.mark.parametrize(
    "settings_of",
    [{"capacity_factor": 0.0}, {"multiple": 0}, {"gamma": 0.0}, {"solver": "sgd"}, {"steps": -1}, {"evaluation": "no"}],
)
def test_impossible_settings_are_refused(settings_of):
    with pytest.raises(UserError, match=f"{next(iter(settings_of))}="):
        SparseTransport(5, **settings_of)


def test_a_graph_holds_one_step_and_not_the_loop():
    """Unrolled, the loop takes a compiler a minute."""

    def nodes(count):
        def weights(logit_TE):
            return SparseTransport(5, steps=count)(call_of(logit_TE, 2), scores_of(logit_TE)).weight_N

        graph = torch.fx.experimental.proxy_tensor.make_fx(weights, tracing_mode="fake")(torch.rand(23, 5))
        return len(graph.graph.nodes)

    assert nodes(40) == nodes(2)
