"""``place``: from loads to a placement."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Num
from rich.console import Console
from rich.progress import Progress

from equipoise.diagnosis.formats import from_loads
from equipoise.diagnosis.trace import Trace
from equipoise.parallel.eplb import rebalance_experts
from equipoise.placement import moetuner, moves, traffic
from equipoise.placement.exact import Solution, improve_exactly
from equipoise.placement.hedge import hedge
from equipoise.placement.pack import pack
from equipoise.placement.placement import Placement, contiguous
from equipoise.placement.problem import Problem, shares
from equipoise.placement.settings import Settings, Solver
from equipoise.placement.validate import check_request

GOOD_GAP = 0.01  # auto is content with this
EXACT_SIZE = 600  # experts times devices times copies up to which auto tries an integer program
EXACT_LAYERS = 10  # auto spends at most the time of so many layers on integer programs

CopiesOfLayers = Bool[np.ndarray, "L E G"]


def place(
    trace: Any,
    devices: int,
    nodes: int = 1,
    replicas: int = 0,
    groups: int = 1,
    solver: Solver = "auto",
    settings: Settings | None = None,
) -> Placement:
    """Decide which devices hold which experts, so that the fullest device has as little to do as possible.

    Several windows are planned for at once: what counts is the worst of them.

    Args:
        trace: a ``Trace``, or what is an array of loads [L, E], or of windows of loads [W, L, E].
        devices: G.
        nodes: of equally many neighbouring devices.
        replicas: copies of experts beyond the first; never two on one device (but for ``eplb``).
        groups: of neighbouring experts; with more than one, each stays on one node.
        solver: ``pack``, local search; ``exact`` (HiGHS) or ``cp_sat`` (extra ``place``), which improve on it until
            time is up; ``auto``, packing, and HiGHS where that leaves a gap and the layer is small; ``eplb``, EPLB's
            answer for the sum of the windows; ``moetuner``, its two programs, for a trace with transitions. ``auto``
            and ``pack`` give up at most a hundredth of the worst window for the others (``hedge``).
        settings: what else; the defaults if not given.
    Fails: UserError for what cannot be, with the numbers that would fit, and for a trace without what is needed.
    """
    settings = settings or Settings()
    trace = trace if isinstance(trace, Trace) else from_loads(trace)
    slots = check_request(trace, devices, nodes, replicas, groups, solver, settings)
    merged_WLE = _merge(trace.load_WLE, settings.windows)
    problems = [
        Problem(shares(load_WE, devices), devices, slots, nodes, groups) for load_WE in merged_WLE.transpose(1, 0, 2)
    ]
    if solver == "eplb":
        return _eplb(trace, problems, settings)
    solutions = _balanced(problems, solver, settings)
    copy_LEG = _with_less_traffic(trace, problems, solutions, solver, settings)
    return _placement(trace, problems, solutions, copy_LEG, (solver, settings))


def _merge(load_WLE: Num[np.ndarray, "W L E"], windows: int) -> Num[np.ndarray, "V L E"]:
    """At most so many windows, each the sum of neighbours."""
    return np.array([part.sum(0) for part in np.array_split(load_WLE, min(windows, len(load_WLE)))])


def _present(trace: Trace, problem: Problem, settings: Settings) -> Placement:
    shape = (len(trace.layers), trace.num_experts, problem.devices, problem.slots, problem.nodes)
    return settings.current or contiguous(*shape)


def _eplb(trace: Trace, problems: list[Problem], settings: Settings) -> Placement:
    one = problems[0]
    load_LE = trace.load_WLE.sum(0).astype(np.float32)
    maps = rebalance_experts(load_LE, one.devices * one.slots, one.groups, one.nodes, one.devices)
    answer = Placement(
        physical_to_logical=maps.physical_to_logical, num_experts=one.num_experts, devices=one.devices, nodes=one.nodes
    )
    planned_WLE = _merge(trace.load_WLE, settings.windows)
    return Placement(
        physical_to_logical=maps.physical_to_logical,
        num_experts=one.num_experts,
        devices=one.devices,
        nodes=one.nodes,
        solver="eplb",
        balance_L=answer.fullest(planned_WLE).max(0),
        bound_L=np.array([problem.bound for problem in problems]),
        moved=moves.moved(answer.copy_LEG, _present(trace, one, settings).copy_LEG),
        expert_bytes=settings.expert_bytes or trace.expert_bytes,
    )


def _balanced(problems: list[Problem], solver: Solver, settings: Settings) -> list[Solution]:
    """Every layer by itself."""
    share = min(1.0, EXACT_LAYERS / len(problems)) if solver == "auto" else 1.0
    with Progress(console=Console(stderr=True), transient=True, disable=not settings.show_progress) as bar:
        layers = bar.track(problems, description="placing layers")
        return [_solve(problem, solver, settings, settings.seconds * share) for problem in layers]


def _solve(problem: Problem, solver: Solver, settings: Settings, seconds: float) -> Solution:
    copy_EG = pack(problem, settings.rounds, settings.seed)
    start = Solution(copy_EG, problem.value(copy_EG), problem.bound, "pack")
    small = problem.num_experts * problem.devices * problem.most_copies <= EXACT_SIZE
    if solver in ("exact", "cp_sat") or (solver == "auto" and small and start.gap > GOOD_GAP):
        start = improve_exactly(problem, start, "cp_sat" if solver == "cp_sat" else "highs", seconds)
    if solver not in ("auto", "pack") or len(problem.share_WE) == 1:
        return start
    hedged_EG = hedge(problem, start.copy_EG)
    return Solution(hedged_EG, problem.value(hedged_EG), start.bound, start.solver)


def _with_less_traffic(
    trace: Trace, problems: list[Problem], solutions: list[Solution], solver: Solver, settings: Settings
) -> CopiesOfLayers:
    """What the solver or the objective asks for beyond balance; devices are renamed so that little moves."""
    one, transition_MEE, slack = problems[0], trace.transition_MEE, settings.slack
    copy_LEG = np.array([solution.copy_EG for solution in solutions])
    cost_GG = traffic.link_costs(one.devices, one.nodes, settings.inter_node)
    if solver == "moetuner":
        assert transition_MEE is not None, "check_request asks for transitions"
        return moetuner.both_stages(problems, copy_LEG, transition_MEE, cost_GG, settings.seconds)
    if settings.objective == "affinity":
        assert transition_MEE is not None, "check_request asks for transitions"
        aligned_LEG = traffic.align(copy_LEG, transition_MEE, cost_GG)
        return traffic.follow(problems, aligned_LEG, transition_MEE, cost_GG, slack)
    if settings.objective == "coactivation":
        assert trace.coactivation_LEE is not None, "check_request asks for co-activation"
        layers = zip(problems, copy_LEG, trace.coactivation_LEE)
        copy_LEG = np.array([traffic.gather(*layer, slack) for layer in layers])
    present_LEG = _present(trace, one, settings).copy_LEG
    return np.array([moves.stay(*pair, one.nodes) for pair in zip(copy_LEG, present_LEG)])


def _placement(
    trace: Trace,
    problems: list[Problem],
    solutions: list[Solution],
    copy_LEG: CopiesOfLayers,
    asked: tuple[Solver, Settings],
) -> Placement:
    one, (solver, settings) = problems[0], asked
    found_by = "+".join(sorted({solution.solver for solution in solutions}))
    present = _present(trace, one, settings)
    order = [moves.slots(copy_EG, present_P) for copy_EG, present_P in zip(copy_LEG, present.physical_to_logical)]
    return Placement(
        physical_to_logical=np.array(order),
        num_experts=one.num_experts,
        devices=one.devices,
        nodes=one.nodes,
        solver="moetuner" if solver == "moetuner" else found_by,
        balance_L=np.array([problem.value(copy_EG) for problem, copy_EG in zip(problems, copy_LEG)]),
        bound_L=np.array([solution.bound for solution in solutions]),
        moved=moves.moved(copy_LEG, present.copy_LEG),
        expert_bytes=settings.expert_bytes or trace.expert_bytes,
    )
