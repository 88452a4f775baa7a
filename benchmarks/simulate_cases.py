"""Published figures beside simulated ones; ``simulate_settings.json`` fixes under which settings."""

from dataclasses import replace
from typing import Any

import numpy as np

from equipoise.parallel import Native, SequenceBalance, SequenceCost, ShardedSparse, overlap_degree
from equipoise.simulator import Policy, Settings, Shape, find_shape, read_cluster, simulate
from equipoise.simulator.calibrate import Fitted, Measurement, calibrate, one_layer

Given = dict[str, Any]


def fit(given: Given) -> Fitted:
    """Fit the constants to LLEP's row for the first model."""
    points = measurements(given, given["fit"])
    return calibrate(read_cluster(given["machine"]), points, given["fit_constants"])


def measurements(given: Given, model: str) -> list[Measurement]:
    """LLEP's table for one model: all but the balanced column, where both run the same plan."""
    row = given["models"][model]
    cluster = read_cluster(given["machine"])
    return [
        Measurement(
            shape=one_layer(find_shape(model)),
            workload=f"hot:{share}:{hot}",
            ranks=cluster.num_ranks,
            tokens=row["tokens"],
            policy="least-loaded",
            speedup=speedup,
        )
        for share in ("0.3", "0.5", "0.8", "0.95")
        for hot, speedup in zip(given["hot"], row[share])
    ]


def llep(given: Given) -> list[Given]:
    """Every point of LLEP's table, with the constants that were fitted to one of its rows."""
    cluster = read_cluster(given["machine"])
    cluster = replace(cluster, software=replace(cluster.software, **given["fitted"]))
    return [
        {
            "model": model,
            "workload": point.workload,
            "published": point.measured,
            "simulated": point.simulated(cluster),
            "fitted": model == given["fit"],
        }
        for model in given["models"]
        for point in measurements(given, model)
    ]


def diagnosis(given: Given) -> list[Given]:
    """One constant at a time, fitted to the rows that were predicted: what the model misses, after the fact."""
    cluster = read_cluster(given["machine"])
    cluster = replace(cluster, software=replace(cluster.software, **given["fitted"]))
    found = []
    for model in given["models"]:
        points = measurements(given, model)
        before = np.mean([abs(point.error(cluster)) for point in points])
        for name in ("plan_seconds", "launch_seconds") if model != given["fit"] else ():
            fitted = calibrate(cluster, points, [name])
            after = np.mean(np.abs(fitted.errors))
            value = fitted.constants[name]
            row = {"model": model, "constant": name, "value": value}
            found.append({**row, "error_before": float(before), "error_after": float(after)})
    return found


def hecate(given: Given) -> list[Given]:
    """Sharded-sparse over native for a range of skews: the paper does not say how skewed its loads were."""
    dim = given["dim"]
    found = []
    for point in given["points"]:
        # Two matrices of d x 2d weigh what three of d x 4d/3 do.
        shape = Shape(
            name="hecate",
            dim=dim,
            hidden_dim=4 * dim // 3,
            num_experts=point["experts"],
            top_k=2,
            num_layers=4,
            other_params=12.0 * dim**2,
        )
        cluster = read_cluster(point["machine"])
        speedups = {}
        for zipf in given["zipf"]:
            settings = Settings(shape=shape, tokens=given["tokens"], windows=given["windows"], ep=cluster.num_ranks)
            speed = cluster.flops * cluster.software.efficiency
            seconds = 2 * shape.other_params * given["tokens"] / speed
            bandwidth = cluster.far_bandwidth * cluster.ranks_per_node * cluster.software.weight_efficiency
            overlap = overlap_degree(seconds, bandwidth, shape.expert_bytes)
            planner = ShardedSparse(overlap=overlap, slots=overlap, ranks_per_node=cluster.ranks_per_node)
            policies = {"native": Native(), "hecate": Policy(planner=planner, broadcast=True)}
            simulation = simulate(f"zipf:{zipf}:{given['drift']}", cluster, policies, settings)
            speedups[str(zipf)] = simulation.speedup("hecate")
        found.append({**point, "overlap": overlap, "simulated": speedups})
    return found


def moetuner(given: Given) -> list[Given]:
    """Balanced placement without replicas over contiguous placement, for a range of skews."""
    mixtral = find_shape("mixtral-8x7b")
    found = []
    for point in given["points"]:
        part = replace(
            mixtral, hidden_dim=mixtral.hidden_dim // point["tp"], other_params=mixtral.other_params / point["tp"]
        )
        settings = Settings(
            shape=part, ep=given["ep"], tokens=given["tokens"], training=False, windows=given["windows"]
        )
        speedups, tails = {}, {}
        for zipf in given["zipf"]:
            simulation = simulate(f"zipf:{zipf}:{given['drift']}", point["machine"], "native,placed", settings)
            native, placed = simulation.outcomes.values()
            speedups[str(zipf)] = simulation.speedup("placed")
            tails[str(zipf)] = 1 - placed.imbalance / native.imbalance
        found.append({**point, "simulated": speedups, "simulated_tail": tails})
    return found


def bytescale(given: Given) -> list[Given]:
    """Balanced sequences over sequences in the order in which they come, with equal numbers of micro-batches."""
    draw = np.random.default_rng(0)
    cost = SequenceCost(quadratic=2.0 * given["layers"] * given["dim"], linear=2.0 * given["params"])
    found = []
    for capacity in given["capacities"]:
        ratios = []
        for _ in range(given["batches"]):
            length_B = _lengths(given, draw)
            groups = [[rank] for rank in range(given["ranks"])]
            balance = SequenceBalance(num_ranks=given["ranks"], capacity=capacity, cost=cost, expert_groups=groups)
            balanced = balance.schedule(length_B).seconds_R().max()
            ratios.append(float(_in_order(length_B, capacity, given["ranks"], cost).max() / balanced))
        found.append({"capacity": capacity, "published": given["published"], "simulated": float(np.mean(ratios))})
    return found


def _lengths(given: Given, draw: np.random.Generator) -> np.ndarray:
    """Log-normal lengths through the two known percentiles, cut at the context, until the batch is full."""
    lengths = np.exp(draw.normal(given["log_mean"], given["log_deviation"], 100_000))
    lengths = np.clip(lengths, 1, given["context"]).astype(np.int64)
    return lengths[: int(np.searchsorted(lengths.cumsum(), given["tokens"]))]


def _in_order(length_B: np.ndarray, capacity: int, ranks: int, cost: SequenceCost) -> np.ndarray:
    """Each rank's work where packs and pieces go to one rank after the other, as they come."""
    work_R, turn, room = np.zeros(ranks), -1, 0
    for length in length_B.tolist():
        if length > room:
            pieces = -(-length // capacity)
            held = np.arange(turn + 1, turn + 1 + pieces) % ranks
            work_R[held] += cost.seconds(length) / pieces
            turn, room = turn + pieces, capacity - length if pieces == 1 else 0
        else:
            work_R[turn % ranks] += cost.seconds(length)
            room -= length
    return work_R
