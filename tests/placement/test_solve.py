import subprocess
import sys

import numpy as np
import pytest
import torch

import equipoise as eq
from equipoise.diagnosis.synthetic import Workload, make_loads, make_trace
from equipoise.placement import Placement, Settings, complaints, contiguous, place
from equipoise.placement.traffic import remote_share, spread

LOADS = np.random.default_rng(0).integers(1, 1000, (3, 16))


def worst(placement: Placement, loads: np.ndarray) -> np.ndarray:
    """The fullest device of each layer in the worst window, slot by slot."""
    worst_L = np.zeros(loads.shape[1])
    for window in loads:
        for layer, load_E in enumerate(window):
            order = placement.physical_to_logical[layer].tolist()
            device = np.zeros(placement.devices)
            for slot, expert in enumerate(order):
                device[slot // placement.slots] += load_E[expert] / order.count(expert)
            worst_L[layer] = max(worst_L[layer], device.max() / device.mean())
    return worst_L


@pytest.mark.parametrize("solver", ["auto", "exact", "cp_sat", "pack", "eplb"])
@pytest.mark.parametrize("replicas", [0, 4])
def test_loads_or_windows_of_loads_become_a_placement(solver, replicas):
    settings = Settings(seconds=0.1)
    for loads in (LOADS, np.stack([LOADS, LOADS[:, ::-1]])):
        placement = place(loads, 4, 2, replicas, solver=solver, settings=settings)
        assert placement.physical_to_logical.shape == (3, 16 + replicas)
        assert placement.bound <= placement.balance + 1e-12
        np.testing.assert_allclose(placement.balance_L, worst(placement, loads.reshape(-1, 3, 16)))
        if solver != "eplb":
            assert complaints(placement) == []


@pytest.mark.parametrize(("experts", "devices", "replicas"), [(8, 4, 0), (6, 3, 3)])
def test_the_exact_solvers_agree_and_prove_it(experts, devices, replicas):
    loads = LOADS[:1, :experts]
    found = [place(loads, devices, replicas=replicas, solver=solver) for solver in ("exact", "cp_sat", "auto")]
    for placement in found:
        np.testing.assert_allclose(placement.balance_L, found[0].balance_L, rtol=1e-4)
    assert max(placement.gap for placement in found[:2]) < 1e-4


def test_groups_stay_on_their_node():
    placement = place(LOADS, 4, 2, 4, groups=4, solver="pack")
    for order in placement.physical_to_logical:
        nodes = [set(half.tolist()) for half in (order[:10] // 4, order[10:] // 4)]
        assert [len(groups) for groups in nodes] == [2, 2]
        assert not nodes[0] & nodes[1]


def test_no_load_at_all_is_balanced():
    placement = place(np.zeros((1, 8)), 4)
    assert placement.balance == pytest.approx(1.0)
    assert placement.gap < 1e-9


def test_what_is_planned_again_from_itself_moves_nothing():
    first = place(LOADS, 4, 2, 4, settings=Settings(expert_bytes=7))
    again = place(LOADS, 4, 2, 4, settings=Settings(expert_bytes=7, current=first))
    np.testing.assert_array_equal(again.physical_to_logical, first.physical_to_logical)
    assert again.moved == 0
    assert again.moved_bytes == 0
    start = contiguous(3, 16, 4, 5, 2)
    gained = (first.copy_LEG & ~start.copy_LEG).sum()
    assert first.moved == gained
    assert first.moved_bytes == 7 * gained


def test_a_plan_for_all_windows_holds_in_windows_that_eplb_adds_up():
    trace = make_loads(Workload(layers=2, num_experts=32, windows=12, domains=3, switch_every=2, tokens=8192))
    past, later = trace.windows(0, 6), trace.load_WLE[6:]
    ours, eplb = (place(past, 8, replicas=8, solver=solver).fullest(later) for solver in ("pack", "eplb"))
    assert ours.mean() < eplb.mean() - 0.05
    assert (ours.mean(1) < eplb.mean(1)).all()


def test_many_windows_are_merged():
    loads = np.random.default_rng(1).integers(1, 100, (40, 2, 16))
    merged = np.array([part.sum(0) for part in np.array_split(loads, 4)])
    few, same = place(loads, 4, settings=Settings(windows=4)), place(merged, 4)
    np.testing.assert_array_equal(few.physical_to_logical, same.physical_to_logical)


def test_affinity_and_coactivation_save_traffic_within_the_slack():
    trace = make_trace(Workload(layers=4, num_experts=16, affinity=0.7, windows=2, tokens=1024))
    plain = place(trace, 4, 2)
    near = place(trace, 4, 2, settings=Settings(objective="affinity", slack=0.05))
    together = place(trace, 4, 2, settings=Settings(objective="coactivation", slack=0.2))
    assert near.balance <= plain.balance * 1.05 + 1e-9
    assert together.balance <= plain.balance * 1.2 + 1e-9
    device, node = zip(*(remote_share(one.copy_LEG, trace.transition_MEE, 2) for one in (plain, near)))
    assert device[1] < device[0] - 0.1
    assert node[1] < node[0] - 0.1
    assert spread(together.copy_LEG, trace.coactivation_LEE, 2) < spread(plain.copy_LEG, trace.coactivation_LEE, 2)


def test_moetuner_answers_for_a_trace_with_transitions():
    trace = make_trace(Workload(layers=3, num_experts=8, affinity=0.8, windows=1, tokens=1024))
    placement = place(trace, 4, solver="moetuner", settings=Settings(seconds=1.0))
    assert placement.solver == "moetuner"
    assert complaints(placement) == []
    plain = place(trace, 4)
    assert (
        remote_share(placement.copy_LEG, trace.transition_MEE, 1)[0]
        < (remote_share(plain.copy_LEG, trace.transition_MEE, 1)[0])
    )


def serve(layer: eq.MoE, order: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """The layer's answer from slots: each has its expert's weights, and rows go to their expert's slots in turn."""
    layer(x)  # routes
    routing, num_slots = layer.routing, len(order)
    slots_E = [np.flatnonzero(order == expert) for expert in range(layer.num_experts)]
    slot_N = torch.tensor([slots_E[e][n % len(slots_E[e])] for n, e in enumerate(routing.expert_N.tolist())])
    by_slot = torch.argsort(slot_N, stable=True)
    load = torch.bincount(slot_N, minlength=num_slots)
    rows = type(routing)(
        routing.token_N[by_slot], slot_N[by_slot], routing.weight_N[by_slot], load, torch.zeros_like(load)
    )
    experts = type(layer.experts)(8, 5, num_slots).double()
    experts.load_state_dict(
        {name: value[torch.from_numpy(order)] for name, value in layer.experts.state_dict().items()}
    )
    return experts(x, rows)


@pytest.mark.parametrize("replicas", [0, 4])
def test_a_placement_leaves_a_models_logits_unchanged(replicas):
    layers = [eq.MoE(dim=8, hidden_dim=5, num_experts=8, top_k=2, method="unbalanced").double() for _ in range(2)]
    head = torch.nn.Linear(8, 11).double()
    x = torch.randn(23, 8, dtype=torch.float64)
    with torch.no_grad():
        logits = head(layers[1].eval()(layers[0].eval()(x)))
        loads = np.stack([layer.routing.load_E.numpy() for layer in layers])
        placement = place(loads, 4, replicas=replicas)
        for layer, order in zip(layers, placement.physical_to_logical):
            x = serve(layer, order, x)
    assert (placement.physical_to_logical != np.arange(8 + replicas) % 8).any()
    torch.testing.assert_close(head(x), logits, rtol=0, atol=1e-12)


def test_placing_needs_no_torch():
    code = "import sys, equipoise.commands.place, equipoise.diagnosis.synthetic; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
