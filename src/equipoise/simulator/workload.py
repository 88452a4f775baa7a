"""What the routers ask for: loads from a trace or from a made-up workload, as rows per rank and expert."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import brentq

from equipoise.diagnosis.synthetic import Workload, make_loads
from equipoise.diagnosis.trace import Trace
from equipoise.errors import require
from equipoise.nearest import nearest
from equipoise.simulator.shape import Shape

KINDS = ("balanced", "hot", "zipf")


def parse_workload(text: str, shape: Shape, windows: int = 2, seed: int = 0) -> Trace:
    """A workload by name: ``balanced``, ``zipf:EXPONENT[:DRIFT]`` or ``hot:SHARE:EXPERTS``.

    ``zipf`` draws tokens that have an expert at most once; popularity drifts from window to window. ``hot`` gives a
    share of the rows to the first experts, evenly, and the rest to the others, as LLEP's benchmark does.

    Fails: UserError for an unknown kind, with the nearest, and for numbers that make no sense.
    """
    kind, *numbers = text.split(":")
    require(kind in KINDS, f"Unknown workload {kind!r}{nearest(kind, KINDS)}; there are {', '.join(KINDS)}.")
    values = [_number(number, text) for number in numbers]
    counts = {"balanced": (0,), "zipf": (1, 2), "hot": (2,)}[kind]
    form = {"balanced": "balanced", "zipf": "zipf:1.2 or zipf:1.2:0.05", "hot": "hot:0.5:4"}[kind]
    require(len(values) in counts, f"Give the workload as {form}, not {text!r}.")
    if kind == "zipf":
        zipf, drift = (*values, 0.05)[:2]
        made = Workload(
            layers=shape.num_layers,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            windows=windows,
            tokens=2**16,
            zipf=zipf,
            drift=drift,
            seed=seed,
        )
        return without_repeats(make_loads(made), shape.top_k)
    share, experts = values if kind == "hot" else (0.0, 0.0)
    return _hot(share, experts, shape, windows)


def without_repeats(trace: Trace, k: int) -> Trace:
    """Popularity turned into loads of tokens whose ``k`` experts differ: none gets more than a row per token.

    Source: experts that are drawn without replacement, one after the other, are the first k arrivals of Poisson
    processes with the popularities as rates. INFERRED: the share of tokens that visit an expert is taken as
    1 - exp(-rate t), with t such that k experts are visited on average.
    """
    tokens = trace.load_WLE[0, 0].sum() / k
    visits = np.array([[_visits(load_E, k) for load_E in load_LE] for load_LE in trace.load_WLE])
    return replace(trace, load_WLE=np.rint(tokens * visits).astype(np.int64), top_k=k)


def rank_loads(load_E: np.ndarray, rows: int, num_ranks: int) -> Int[np.ndarray, "R E"]:
    """Loads of experts scaled to so many rows, and shared out among the ranks, which all route alike.

    Args:
        load_E: rows or shares of each expert, not all 0.
        rows: of all ranks together.
        num_ranks: R.
    Returns:
        rows of each rank and expert; sums differ by one at most per expert.
    """
    exact_E = load_E * (rows / load_E.sum())
    whole_E = np.floor(exact_E).astype(np.int64)
    short = rows - int(whole_E.sum())
    whole_E[np.argsort(whole_E - exact_E, kind="stable")[:short]] += 1
    end_RE = whole_E * np.arange(num_ranks + 1)[:, None] // num_ranks
    return np.diff(end_RE, axis=0)


def check_fits(trace: Trace, shape: Shape, num_ranks: int) -> None:
    """Fails: UserError for a trace of another model, a step without rows, or fewer experts than ranks."""
    experts, layers = trace.num_experts, trace.load_WLE.shape[1]
    require(
        experts == shape.num_experts,
        f"The trace has {experts} experts, but {shape.name} has {shape.num_experts}; give the model that it is of.",
    )
    known = trace.top_k is None or trace.top_k == shape.top_k
    require(known, f"The trace has {trace.top_k} experts per token, but {shape.name} has {shape.top_k}.")
    require(
        layers == shape.num_layers,
        f"The trace has {layers} layers, but {shape.name} has {shape.num_layers}; give the model that it is of.",
    )
    require(
        experts >= num_ranks,
        f"{experts} experts cannot be spread over expert-parallel groups of {num_ranks} ranks; give a smaller ep.",
    )
    empty = np.argwhere(trace.load_WLE.sum(2) == 0)
    require(not len(empty), f"The trace has no rows in window {empty[0][0] if len(empty) else 0}; leave that out.")


def _visits(load_E: np.ndarray, k: int) -> Float[np.ndarray, " E"]:
    """The share of tokens that visit each expert."""
    rate_E = load_E / load_E.sum()
    if k >= int((rate_E > 0).sum()):
        return (rate_E > 0).astype(float)
    time = brentq(
        lambda time: float(-np.expm1(-rate_E * time).sum()) - k, 0, 64 * len(rate_E) / rate_E[rate_E > 0].min()
    )
    return -np.expm1(-rate_E * time)


def _hot(share: float, experts: float, shape: Shape, windows: int) -> Trace:
    whole = float(experts).is_integer() and 0 <= experts < shape.num_experts
    require(whole, f"The hot experts must be a whole number below {shape.num_experts}, not {experts:g}.")
    require(0 <= share <= 1, f"The share of the hot experts must be from 0 to 1, not {share:g}.")
    count = int(experts)
    share_E = np.full(shape.num_experts, (1 - share) / (shape.num_experts - count))
    share_E[:count] = share / max(count, 1)
    load_WLE = np.broadcast_to(share_E, (windows, shape.num_layers, shape.num_experts)).copy()
    names = tuple(str(layer) for layer in range(shape.num_layers))
    return Trace(load_WLE=load_WLE, layers=names, top_k=shape.top_k, about={"source": "synthetic"})


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    require(math.isfinite(value) and value >= 0, f"{text!r} in the workload {where!r} must be a number of at least 0.")
    return value
