"""Two ranks are one process: the same outputs, router gradients, counts and states, and the same losses read."""

import pytest
import torch

from equipoise import attach
from laws.cases import PER_CALL, build, counts_of, loss_of, same, state_of, tokens
from ranks.jobs import train

pytestmark = pytest.mark.xdist_group("ranks")
SIZES = [(5, 5), (3, 8), (11, 0)]  # tokens by rank: even, uneven, a rank without any


def steps_of(*sizes):
    """Two steps of different data, one micro-batch per rank."""
    return [[[x] for x in tokens(sum(sizes), seed=seed).split(list(sizes))] for seed in (1, 2)]


def one_process(method, steps, per_call=False):
    """The oracle: one batch of all that the ranks saw; where a method is defined per call, their calls one by one."""
    calls = [[x for micro in step for x in micro] for step in steps]
    layer = build(method)
    return train(0, layer, layer, [[micro if per_call else [torch.cat(micro)]] for micro in calls])


@pytest.mark.parametrize("sizes", SIZES)
def test_two_ranks_are_one_process(ranks, make, method, sizes):
    steps = steps_of(*sizes)
    reports = zip(*ranks.run("ranks.jobs:train_ddp", make=make, method=method, steps=steps))
    for (first, second), expected in zip(reports, one_process(method, steps, method in PER_CALL), strict=True):
        same(torch.cat([first["outputs"], second["outputs"]]), expected["outputs"])
        for found in (first, second):
            for key in ("gradient", "counts", "state"):
                same(found[key], expected[key])


@pytest.mark.parametrize("sizes", SIZES)
def test_two_ranks_read_the_losses_of_one_process(ranks, make, method, sizes):
    steps = steps_of(*sizes)
    reports = zip(*ranks.run("ranks.jobs:train_ddp", make=make, method=method, steps=steps))
    for found, expected in zip(reports, one_process(method, steps, method in PER_CALL), strict=True):
        assert [report["loss"] for report in found] == [pytest.approx(expected["loss"], rel=1e-9)] * 2


@pytest.mark.parametrize(("sync", "wrap"), [(True, "plain"), (False, "plain"), (False, "non_reentrant")])
def test_accumulation_over_ranks(ranks, make, method, sync, wrap):
    """Every rank has its own tokens, twice, so that a running count is right at once; with and without ``no_sync``.

    Without it, DDP broadcasts its buffers between the micro-batches: a counter among them would be overwritten.
    """
    steps = [[[x, x] for x in tokens(2, 5, seed=seed)] for seed in (1, 2)]
    arguments = {"make": make, "method": method, "steps": steps, "sync": sync, "wrap": wrap}
    for reports in ranks.run("ranks.jobs:train_ddp", **arguments):
        for found, expected in zip(reports, one_process(method, steps, method in PER_CALL), strict=True):
            for key in ("gradient", "counts", "state"):
                same(found[key], expected[key])


@pytest.mark.parametrize("sizes", [(3, 8)])
def test_sharded_ranks_are_one_process(ranks, make, method, sizes):
    """FSDP2: the router's gradient, put together, the counts and the state."""
    steps = steps_of(*sizes)
    reports = zip(*ranks.run("ranks.jobs:train_sharded", make=make, method=method, steps=steps))
    for both, expected in zip(reports, one_process(method, steps, method in PER_CALL), strict=True):
        for found in both:
            for key in ("gradient", "counts", "state"):
                same(found[key], expected[key])


def test_a_sharded_layer_without_tokens(ranks, make):
    """Its step needs no parameters, so no rank waits for another's."""
    for state in ranks.run("ranks.jobs:step_sharded", timeout=20.0, make=make, method="quantile"):
        same(state, state_of(build("quantile")) | {"step": torch.tensor(1)})


def test_ranks_differ_in_what_they_see(ranks, make, method):
    """The guard of the laws above: alone, as its own group, each rank commits other counts than both together."""
    steps = steps_of(5, 7)
    (alone, together), (other, also_together) = ranks.run(
        "ranks.jobs:train_in_groups", make=make, method=method, steps=steps
    )
    same(together, also_together)
    assert [found["counts"]["tokens"].item() for found in (alone, other, together)] == [5, 7, 12]
    for found, x in zip((alone, other), steps[0]):
        layer = build(method)
        handle = attach(layer, ())
        handle.follow(loss_of(layer(x[0]))).backward()
        handle.step()
        same(found, {"counts": counts_of(layer.window.last), "state": state_of(layer)})


@pytest.mark.parametrize("count", [0, 2])
def test_steps_by_hand_are_steps_of_one_process(ranks, make, method, count):
    """Also a step in which nothing was counted anywhere."""
    steps_with(ranks, make, method, count)


def test_a_rank_without_a_micro_batch(ranks, make, method):
    """It adds zeros: the others' counts move its state too."""
    steps_with(ranks, make, method, 1)


def steps_with(ranks, make, method, count):
    """``count`` of the two ranks come to ``handle.step()`` with a micro-batch."""
    micro = [tokens(5, seed=seed) for seed in range(count)]
    layer = build(method)
    handle = attach(layer, ())
    for x in micro:
        handle.follow(loss_of(layer(x))).backward()
    handle.step()
    for state in ranks.run("ranks.jobs:step_by_hand", make=make, method=method, micro=micro):
        same(state, state_of(layer))
