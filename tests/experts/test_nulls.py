import torch

from equipoise.contracts import Routing
from equipoise.experts.nulls import identity


def test_only_rows_of_nulls_add_their_token():
    """Two true experts, two nulls (2 and 3), a row without use (4)."""
    token_N, expert_N = torch.tensor([0, 1, 0, 2, 2, 0]), torch.tensor([0, 1, 2, 2, 3, 4])
    weight_N = torch.tensor([0.5, 1.0, 0.25, 0.5, 0.75, 0.0])
    load_E = torch.tensor([1, 1, 2, 1])
    routing = Routing(token_N, expert_N, weight_N, load_E, torch.zeros_like(load_E))
    x = torch.arange(6.0).view(3, 1, 2) + 1
    expected = x * torch.tensor([0.25, 0.0, 1.25]).view(3, 1, 1)
    assert torch.equal(identity(x, routing, 2), expected)
    assert torch.equal(identity(x.view(1, 3, 2), routing, 2), expected.view(1, 3, 2))
    assert torch.equal(identity(x.view(3, 2), routing, 2), expected.view(3, 2))
    assert identity(x.bfloat16(), routing, 2).dtype == torch.bfloat16


def test_the_weights_of_nulls_learn_and_no_others():
    token_N, expert_N = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 3])
    weight_N = torch.tensor([0.5, 1.0, 0.25], requires_grad=True)
    load_E = torch.tensor([1, 0, 1, 1])
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    identity(x, Routing(token_N, expert_N, weight_N, load_E, torch.zeros_like(load_E)), 2).sum().backward()
    assert torch.equal(weight_N.grad, torch.tensor([3.0, 0.0, 7.0]))
    assert torch.equal(x.grad, torch.tensor([[0.5, 0.5], [0.25, 0.25]]))
