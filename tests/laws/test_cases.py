"""The laws' own tools: exemptions and settings are needed, tolerances separate, the snapshot sees everything."""

from importlib import import_module

import pytest
import torch

from equipoise import METHODS, MoE
from laws.cases import EXEMPTIONS, SETTINGS, TOLERANCE, D, E, K, build, differ, loss_of, same, state_of


def test_methods_that_look_across_tokens_refuse_evaluation_until_a_fall_back_is_named():
    for method, row in METHODS.items():
        layer = MoE(method=method, dim=D, hidden_dim=3, num_experts=E, top_k=K).eval()
        if row.causal:
            layer(torch.zeros(1, D))
        else:
            assert "evaluation" in SETTINGS[method]
            with pytest.raises(ValueError, match="fall-back"):
                layer(torch.zeros(1, D))


@pytest.mark.parametrize(("exempt", "law"), [key for key in EXEMPTIONS if "test_ranks" not in key[1]])
def test_exemptions_are_needed(exempt, law):
    """The method breaks the law it is exempt from."""
    module, name = law.split(".")
    check = getattr(import_module(module), name)
    with pytest.raises(AssertionError):
        check(build, exempt, **first_case(check))


def first_case(check):
    """The first values that a law is parametrized with, beside the method."""
    cases = {}
    for names, values in (mark.args for mark in getattr(check, "pytestmark", [])):
        first = next(iter(values))
        cases |= {names: first} if isinstance(names, str) else dict(zip(names, first))
    return cases


def test_the_tolerance_separates():
    """fp64 passes rounding and nothing else; integers, masks and fp32 state must be equal."""
    one = torch.ones(3, dtype=torch.float64)
    assert not differ(one + 1e-11, one)
    assert differ(one + 1e-8, one)
    assert all(row == {"rtol": 0.0, "atol": 0.0} for dtype, row in TOLERANCE.items() if dtype != torch.float64)
    with pytest.raises(AssertionError):
        same({"a": one.float() + 1e-7}, {"a": one.float()})
    with pytest.raises(AssertionError):
        same({"a": one, "b": one}, {"a": one})


def test_what_is_compared_is_not_nothing():
    layer = build("quantile")
    assert state_of(layer).keys() == {"step", "balancers.quantile.bias_E"}
    assert all(value.any() for name, value in state_of(layer).items() if name != "step")
    y, mask = torch.full((2, 3), 2.0), torch.tensor([True, False])
    assert (loss_of(y), loss_of(y, mask), loss_of(y, reduction="sum"), loss_of(y[:0])) == (12, 12, 24, 0)
