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
    assert identity(x.bfloat16(), routing, 2).dtype == torch.bfloat16
