"""Numbers of an evaluation, on routing that is written down here."""

import contextlib
import math

import pytest
import torch
from torch import nn

from equipoise.balancing.balanced import balanced_layers
from equipoise.contracts import NonFiniteError, Routing
from equipoise.moe import MoE
from equipoise.training.evaluation import Evaluation, evaluate, specialisation

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("load_GE", "value"),
    [
        ([[7, 0, 0], [0, 5, 6]], 1.0),  # an expert gives the domain away
        ([[2, 4, 6], [1, 2, 3]], 0.0),  # both domains use the experts alike
        ([[5, 3, 2]], 0.0),  # one domain: there is nothing to tell
        ([[5, 3, 2], [0, 0, 0]], 0.0),  # or one that has no rows
        ([[0, 0], [0, 0]], 0.0),
    ],
)
def test_specialisation_of_the_extremes(load_GE: list[list[int]], value: float) -> None:
    assert specialisation(torch.tensor(load_GE)) == pytest.approx(value, abs=1e-12)


def test_specialisation_is_mutual_information_over_the_domains_entropy() -> None:
    load_GE = torch.tensor([[11, 2, 0, 7], [3, 13, 1, 5], [2, 2, 17, 0]])
    total = float(load_GE.sum())
    share_G, share_E = load_GE.sum(1) / total, load_GE.sum(0) / total
    information = sum(
        load / total * math.log(load / total / (share_G[g] * share_E[e]))
        for g, row in enumerate(load_GE.tolist())
        for e, load in enumerate(row)
        if load
    )
    entropy = -sum(share * math.log(share) for share in share_G.tolist())
    assert 0.1 < specialisation(load_GE) < 0.9
    assert specialisation(load_GE) == pytest.approx(float(information) / entropy, rel=1e-6)


def test_each_layer_reads_its_load_over_all_domains() -> None:
    load = torch.tensor([[6, 0, 1, 1], [2, 0, 3, 3]])
    (layer,) = Evaluation(1.0, {"layers.0.moe": load}, ("a", "b")).per_layer()
    share = torch.tensor([8, 4, 4]) / 16
    assert layer == {
        "name": "layers.0.moe",
        "load": [8, 0, 4, 4],
        "max_vio": 1.0,
        "load_cv": pytest.approx(math.sqrt(8) / 4),
        "load_entropy": pytest.approx(float(-(share * share.log()).sum()) / math.log(4)),
        "dead_experts": 1,
        "specialisation": pytest.approx(specialisation(load)),
        "domain_load": {"a": [6, 0, 1, 1], "b": [2, 0, 3, 3]},
    }


class Readable(nn.Module):
    """Token t goes to experts t and t + 1 of five, and its logits favour token t + 1 by 3."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = MoE(dim=2, hidden_dim=3, num_experts=5, top_k=2, method="unbalanced", kernel="loop")
        self.modes: list[bool] = []

    def forward(self, token_BS: torch.Tensor) -> torch.Tensor:
        self.modes.append(self.training)
        token_T = token_BS.flatten()

        def routes(call, scores, selector) -> Routing:
            assert not torch.is_grad_enabled()
            expert_N = torch.stack([token_T, token_T + 1]).flatten() % 5
            token_N = torch.arange(len(token_T)).repeat(2)
            expert_N[-1] = 5  # one row without use
            load_E = torch.bincount(expert_N, minlength=6)[:5]
            order = expert_N.argsort(stable=True)
            return Routing(token_N[order], expert_N[order], torch.ones(len(order)), load_E, torch.zeros_like(load_E))

        self.moe.override = routes
        self.moe(torch.zeros(*token_BS.shape, 2))
        return 3.0 * nn.functional.one_hot((token_BS + 1) % 7, 7)


def test_counts_rows_by_the_domain_of_the_token_that_was_routed_and_weighs_batches_by_their_tokens() -> None:
    model = Readable()
    token = [torch.tensor([[0, 1, 2, 5]]), torch.tensor([[3, 3, 0, 1], [1, 2, 3, 4]])]
    domain = [torch.tensor([[0, 0, 1, 1]]), torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])]
    batches = list(zip(token, [each.to(torch.uint8) for each in domain]))
    found = evaluate(model, batches, ("a", "b"), CPU, contextlib.nullcontext())

    right, wrong = math.log(1 + 6 * math.exp(-3)), math.log(math.exp(3) + 6)
    assert found.loss == pytest.approx((2 * right + 1 * wrong + 4 * right + 2 * wrong) / 9, rel=1e-6)
    # Inputs 0 1 | 2 of the first batch and | 3 3 0, 1 2 3 of the second; the last row of each call has no use.
    expected = torch.tensor([[1, 2, 1, 0, 0], [0, 0, 1, 0, 0]]) + torch.tensor([[0, 1, 2, 2, 0], [1, 1, 0, 2, 2]])
    assert found.domain_load["moe"].tolist() == expected.tolist()
    assert found.domains == ("a", "b")
    assert model.modes == [False, False]
    assert model.training
    model.eval()
    evaluate(model, batches, ("a", "b"), CPU, contextlib.nullcontext())
    assert not model.training


def test_no_batches_are_no_loss() -> None:
    assert math.isnan(evaluate(Readable(), [], ("a",), CPU, contextlib.nullcontext()).loss)


def test_runs_under_the_precision_of_training_and_names_a_broken_layer() -> None:
    model = Readable()
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    batches = [(torch.tensor([[0, 1, 2]]), torch.zeros(1, 3, dtype=torch.uint8))]
    evaluate(model, batches, ("a",), CPU, torch.autocast("cpu", torch.bfloat16))
    assert seen == [True]
    with torch.no_grad():
        model.moe.router.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError) as caught:
        evaluate(model, batches, ("a",), CPU, contextlib.nullcontext())
    assert caught.value.layer is balanced_layers(model)["moe"]
