from dataclasses import replace

import pytest
import torch

from equipoise import MoE, UserError
from equipoise.balancing.bias import Bias
from equipoise.routing.sigmoid import Sigmoid
from equipoise.routing.top_k import TopK
from hand_made import attach_still, call_of, dense, scores_of

SIZES = {"dim": 7, "hidden_dim": 5, "num_experts": 5, "top_k": 2, "kernel": "loop", "method": "loss_free"}


def updated(demand_E, rate=1e-3, **settings):
    balancer = Bias(len(demand_E), rate=rate, **settings)
    none = torch.zeros(())
    balancer.update({"demand_E": torch.tensor(demand_E), "best": none, "tokens": none})
    return balancer.bias_E


def offset_scores(num_tokens, num_experts, seed=0):
    """Sigmoid scores of Gaussian logits with an offset per expert, both of standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    offset_E = torch.randn(num_experts, generator=generator)
    return (torch.randn(num_tokens, num_experts, generator=generator) + offset_E).sigmoid()


def load_of(score_TE, bias_E, k):
    return torch.bincount((score_TE + bias_E).topk(k).indices.flatten(), minlength=len(bias_E))


@pytest.mark.parametrize("rate", [1e-3, 0.7])
def test_every_bias_steps_by_the_rate_against_its_excess_load(rate):
    step = torch.tensor(rate)
    assert updated([9, 3, 6, 6, 6], rate).tolist() == [-step, step, 0, 0, 0]
    assert updated([1, 0, 0], rate).tolist() == [-step, step, step]
    assert updated([0, 0, 0], rate).tolist() == [0, 0, 0]


def test_it_is_algorithm_1_of_the_paper():
    """In plain loops: the K best of s + b get the gate s, loads are counted, b moves by u sign(mean load - load)."""
    balancer, selector, bias, rate, k = Bias(5, rate=2**-6), TopK(5, renormalize=False), [0.0] * 5, 2**-6, 2
    offset_E = torch.randn(5).double()
    for logit_TE in torch.randn(11, 23, 5).double() + offset_E:
        score_TE = logit_TE.sigmoid()
        expected_TE, load = torch.zeros(23, 5).double(), [0] * 5
        for t, score in enumerate(score_TE.tolist()):
            for e in sorted(range(5), key=lambda e, score=score: -(score[e] + bias[e]))[:k]:
                expected_TE[t, e], load[e] = score[e], load[e] + 1
        call, scores = call_of(score_TE, k), scores_of(score_TE)
        routing = selector(call, replace(balancer.adjust(call, scores), gate_TE=score_TE))
        assert torch.equal(dense(routing, 23)[0], expected_TE)
        balancer.update(balancer.statistics(call, scores, routing))
        bias = [b + rate * ((sum(load) > 5 * c) - (sum(load) < 5 * c)) for b, c in zip(bias, load)]
        assert balancer.bias_E.tolist() == bias
    assert max(bias) - min(bias) > 10 * rate


def test_linear_and_rms_steps_by_hand():
    # The mean load is 6; the excess 3, -3, 0, 0, 0, whose root mean square is sqrt(18 / 5).
    torch.testing.assert_close(updated([9, 3, 6, 6, 6], 0.5, rule="linear"), torch.tensor([-0.25, 0.25, 0, 0, 0]))
    step = 0.5 * 3 / (18 / 5) ** 0.5
    torch.testing.assert_close(updated([9, 3, 6, 6, 6], 0.5, rule="rms"), torch.tensor([-step, step, 0, 0, 0]))


@pytest.mark.parametrize("rule", ["linear", "rms"])
@pytest.mark.parametrize("load", [0, 1, 2**24 + 1, 10**12 + 7])
def test_every_rule_stands_still_at_equal_loads_and_sees_one_row(rule, load):
    assert updated([load] * 7, rule=rule).tolist() == [0] * 7
    assert updated([load + 1] + [load] * 6, rule=rule).sign().tolist() == [-1] + [1] * 6


def test_a_linear_step_does_not_depend_on_the_size_of_the_batch():
    assert torch.equal(updated([9, 3, 6], rule="linear"), updated([900, 300, 600], rule="linear"))


def test_centred_steps_have_no_mean_and_choose_alike():
    # A rate and a number of experts that are powers of 2, so that rounding breaks no tie.
    score_TE, plain, centred = offset_scores(101, 8).double(), Bias(8, rate=2**-6), Bias(8, rate=2**-6, centre=True)
    for _ in range(50):
        load_E = load_of(score_TE, plain.bias_E, 3)
        assert torch.equal(load_of(score_TE, centred.bias_E, 3), load_E)
        plain.update({"demand_E": load_E}), centred.update({"demand_E": load_E})
        assert centred.bias_E.mean() == 0
    assert plain.bias_E.mean() != 0
    assert torch.equal(centred.bias_E, plain.bias_E - plain.bias_E.mean())


@pytest.mark.parametrize(("schedule", "shrunk"), [("constant", 1), ("inverse_sqrt", 3), ("inverse", 9)])
@pytest.mark.parametrize("batches", [1, 3])
def test_the_schedule_counts_the_optimizers_steps_whatever_the_micro_batches(schedule, shrunk, batches):
    layer = MoE(**SIZES | {"method": "primal_dual"}, rate=0.6, schedule=schedule)
    layer.step += 8  # as after loading the checkpoint of the eighth step: the next is the ninth
    _, optimizer = attach_still(layer)
    for x in torch.randn(33, 7).chunk(batches):
        layer(x).sum().backward()
    optimizer.step()
    demand_E = layer.window.last["demand_E"].double()
    step_E = 0.6 / shrunk * (1 - demand_E / demand_E.mean())
    assert step_E.abs().max() > 0.01
    torch.testing.assert_close(layer.balancers["bias"].bias_E.double(), step_E, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("load", [1, 3, 2**24 + 1, 2**31 + 3, 10**12 + 7])
def test_equal_loads_are_equal_and_one_row_is_a_difference_whatever_the_size(load):
    assert updated([load] * 7).tolist() == [0] * 7
    step = torch.tensor(1e-3)
    assert updated([load + 1] + [load] * 6).tolist() == [-step] + [step] * 6
    assert updated([load + 1, load - 1] + [load] * 5).tolist() == [-step, step, 0, 0, 0, 0, 0]


def test_choice_moves_and_gate_and_probabilities_do_not():
    call, balancer = call_of(torch.randn(11, 5), 2), Bias(5)
    scores = Sigmoid(5)(call)
    balancer.bias_E.copy_(torch.randn(5))
    adjusted = balancer.adjust(call, scores)
    torch.testing.assert_close(adjusted.choice_TE - balancer.bias_E, scores.choice_TE)
    assert all(getattr(adjusted, name) is getattr(scores, name) for name in ("logit_TE", "prob_TE", "gate_TE"))


@pytest.mark.parametrize("shift", [-3.0, 0.25, 1000.0])
def test_adding_a_constant_to_every_bias_changes_no_choice(shift):
    score_TE, balancer = offset_scores(101, 11).double(), Bias(11)
    balancer.bias_E.copy_((torch.randn(11) * 64).round() / 64)  # dyadic, so that the sums below are exact
    call, scores = call_of(score_TE, 3), scores_of(score_TE)
    before = TopK(11)(call, balancer.adjust(call, scores))
    balancer.bias_E += shift
    after = TopK(11)(call, balancer.adjust(call, scores))
    assert torch.equal(before.expert_N, after.expert_N)
    assert torch.equal(before.token_N, after.token_N)
    assert torch.equal(before.weight_N, after.weight_N)


def test_weights_do_not_depend_on_the_bias_where_the_choice_is_the_same():
    score_TE, balancer = offset_scores(101, 11), Bias(11)
    call, scores = call_of(score_TE, 3), scores_of(score_TE)
    balancer.bias_E.copy_(torch.randn(11) * 0.3)
    weight_TE, chosen_TE = dense(TopK(11)(call, balancer.adjust(call, scores)), 101)
    share_TE = score_TE * chosen_TE / (score_TE * chosen_TE).sum(1, keepdim=True)
    torch.testing.assert_close(weight_TE, share_TE, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"rate": -1e-3}, "is no step"),
        ({"rule": "signed"}, "sign, linear, rms"),
        ({"schedule": "1/n"}, "constant, inverse_sqrt, inverse"),
        ({"alarm": -1.0}, "0 for no alarm"),
    ],
)
def test_impossible_settings_are_refused(setting, words):
    with pytest.raises(UserError, match=words):
        Bias(5, **setting)


def test_no_token_moves_towards_a_relatively_fuller_expert():
    score_TE, balancer = offset_scores(512, 16).double(), Bias(16, rate=1e-2)
    moves = 0
    for _ in range(200):
        before_T = (score_TE + balancer.bias_E).argmax(1)
        load_E = torch.bincount(before_T, minlength=16)
        balancer.update({"demand_E": load_E})
        after_T = (score_TE + balancer.bias_E).argmax(1)
        excess_E = torch.sign(16 * load_E - 512)
        left_T = before_T != after_T
        assert (excess_E[after_T[left_T]] <= excess_E[before_T[left_T]]).all()
        moves += int(left_T.sum())
    assert moves > 500


def test_a_stream_of_batches_is_balanced_at_the_speed_of_the_rate():
    offset_E = torch.randn(64)

    def max_vio_after(steps, rate):
        balancer, generator = Bias(64, rate=rate), torch.Generator().manual_seed(1)
        for _ in range(steps):
            score_TE = (torch.randn(1024, 64, generator=generator) + offset_E).sigmoid()
            load_E = load_of(score_TE, balancer.bias_E, 8)
            balancer.update({"demand_E": load_E})
        return (load_E.max() / load_E.double().mean() - 1).item()

    assert max_vio_after(1, 1e-2) > 2.5
    assert max_vio_after(150, 1e-4) > 2
    assert max_vio_after(150, 1e-2) < 0.5


def test_micro_batches_move_the_bias_as_one_batch_does():
    x = torch.randn(22, 7)

    def bias_after(batches):
        torch.manual_seed(1)
        layer = MoE(**SIZES)
        _, optimizer = attach_still(layer)
        for batch in batches:
            layer(batch).sum().backward()
        optimizer.step()
        return layer.balancers["bias"].bias_E

    whole = bias_after([x])
    assert set(whole.abs().tolist()) <= {0, torch.tensor(1e-3).item()}
    assert whole.abs().sum() > 0
    assert torch.equal(whole, bias_after([x[:3], x[3:13], x[13:]]))


def test_dropped_rows_count_as_demand():
    # Six tokens want the first expert and three the second, which is its share; each expert serves three.
    score_TE = torch.tensor([[0.9, 0.5, 0.1]] * 6 + [[0.5, 0.9, 0.1]] * 3)
    call, scores, balancer = call_of(score_TE, 1), scores_of(score_TE), Bias(3)
    routing = TopK(3, capacity_factor=1.0)(call, scores)
    assert routing.load_E.tolist() == [3, 3, 0]
    balancer.update(balancer.statistics(call, scores, routing))
    step = torch.tensor(1e-3).item()
    assert balancer.bias_E.tolist() == [-step, 0, step]


def test_evaluation_uses_the_bias_and_leaves_it_alone():
    layer = MoE(**SIZES)
    layer.balancers["bias"].bias_E.copy_(torch.tensor([0.0, 9.0, 0.0, 9.0, 0.0]))
    _, optimizer = attach_still(layer)
    layer.eval()(torch.randn(11, 7)).sum().backward()
    optimizer.step()
    assert layer.routing.load_E.tolist() == [0, 11, 0, 11, 0]
    assert layer.balancers["bias"].bias_E.tolist() == [0, 9, 0, 9, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_model_leaves_the_bias_in_fp32(dtype):
    layer = MoE(**SIZES)
    bias_E = torch.tensor([0.5, 0.501, -0.25001, 1e-3, 0.0])
    layer.balancers["bias"].bias_E.copy_(bias_E)
    layer.to(dtype)
    assert layer.balancers["bias"].bias_E.dtype == torch.float32
    assert torch.equal(layer.balancers["bias"].bias_E, bias_E)
    twin = MoE(**SIZES).to(dtype)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.balancers["bias"].bias_E, bias_E)
