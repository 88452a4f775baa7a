"""A compiled layer is the eager one: output, router gradient and counts, also where its output is kept."""

import pytest

from equipoise import METHODS
from laws.cases import same

pytestmark = pytest.mark.xdist_group("ranks")


def same_as_eager(ranks, make, **arguments):
    eager, other = ranks.run("ranks.compiling:compare", timeout=300.0, make=make, **arguments)[0]
    same(other["y"], eager["y"])
    for name in ("seen", "gradients", "counts"):
        for actual, expected in zip(other[name], eager[name], strict=True):
            same(actual, expected)


def test_compiled_is_eager(ranks, make):
    """All methods in one graph, without a break, through the part of the compiler that splits off the backward."""
    same_as_eager(ranks, make, methods=list(METHODS), way="compiled", backend="aot_eager")


def test_compiled_keeps_the_tap(ranks, make):
    """The law that a tap on an aliased output breaks: one layer whose output is also kept."""
    same_as_eager(ranks, make, methods=["global_batch"], way="compiled", backend="aot_eager")


def test_a_checkpoint_around_a_compiled_layer(ranks, make):
    same_as_eager(ranks, make, methods=list(METHODS), way="checkpointed", backend="aot_eager")


def test_checkpoints_inside_a_compiled_model(ranks, make):
    same_as_eager(ranks, make, methods=list(METHODS), way="checkpointing", backend="aot_eager")


def test_a_second_backward_of_a_compiled_layer(ranks, make):
    same_as_eager(ranks, make, methods=["global_batch"], way="compiled", backend="aot_eager", backward=2)


@pytest.mark.slow
def test_generated_code_is_eager(ranks, make, method):
    same_as_eager(ranks, make, methods=[method], way="compiled", backend="inductor")
