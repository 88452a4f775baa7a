"""The page of the serving benchmark, from its JSON."""

from __future__ import annotations

from typing import Any

ENOUGH = 0.9  # capacity up to which a policy carries a load
RATIOS = {"hit_rate": "affinity", "load_cv": "least_loaded"}

HEAD = """# Serving: which replica gets a request

Simulated, not measured on servers: [`costs.py`](../../src/equipoise/serving/costs.py) holds every constant and
[`workload.py`](../../src/equipoise/serving/workload.py) the generator. Both were fixed before the first policy was run,
and no setting of a policy was changed after a result; only the speeds were chosen after a look at where the knee lies.
Made by

    python benchmarks/serving.py --trace conversation=FILE synthetic=FILE --million

from Mooncake's FAST'25 traces (the first 6,000 requests of conversation, 3,993 synthetic ones) and 10,000 generated
requests (`skewed`). As published, prompts are cut to {longest:,} tokens, the first {warmup} requests are warm-up and
the SLO is 5 s to the first token. Speed 1 is the trace's own rate on 8 replicas; on 32 everything comes four times as
fast. Commit {commit} and the files of this page, {date}, {cpu}, one thread. Policies are deterministic and
every workload is one draw: there is no spread to report.
"""


def page(results: dict[str, Any]) -> str:
    """Markdown."""
    environment = results["environment"]
    head = HEAD.format(
        longest=results["longest_prompt"],
        warmup=results["warmup"],
        commit=str(environment["commit"])[:10],
        date=environment["date"],
        cpu=environment["cpu"],
    )
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in results["runs"]:
        groups.setdefault((run["workload"], run["replicas"]), []).append(run)
    parts = [head, *(_workload(*key, runs) for key, runs in groups.items()), _goals(groups), _routers(results, groups)]
    parts.append(_variants(results))
    if "million" in results:
        parts.append(_million(results["million"]))
    return "\n".join(parts)


def knee(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest run in which any policy still serves 90 % within the SLO; the slowest where none does."""
    carried = [run for run in runs if max(policy["capacity"] for policy in run["policies"].values()) >= ENOUGH]
    return max(carried, key=lambda run: run["speed"]) if carried else runs[0]


def _workload(name: str, replicas: int, runs: list[dict[str, Any]]) -> str:
    policies = list(runs[0]["policies"])
    speeds = [f"{run['speed']:g} ({run['settings']['requests_per_second']:.1f}/s)" for run in runs]
    best = [max(policy["capacity"] for policy in run["policies"].values()) for run in runs]
    rows = [
        [policy, *(_bold(run["policies"][policy]["capacity"], top) for run, top in zip(runs, best))]
        for policy in policies
    ]
    at = knee(runs)
    details = [
        [
            policy,
            f"{found['capacity']:.1%}",
            f"{found['goodput']:.2f}",
            *(f"{found[key]:.2f}" for key in ("ttft_p50", "ttft_p90", "ttft_p99")),
            f"{found['hit_rate']:.1%}",
            f"{found['load_cv']:.2f}",
            f"{found['router_ms']:.3f}",
        ]
        for policy, found in at["policies"].items()
    ]
    bound = at["policies"][policies[0]]["hit_rate_bound"]
    return (
        f"## {name}, {replicas} replicas\n\nEffective capacity, the share of requests within the SLO, by speed; the "
        f"best is bold.\n\n{_table(['policy', *speeds], rows)}\n\nAt the knee, speed {at['speed']:g} (the fastest "
        f"that any policy carries at 90 %); one endless cache would find {bound:.1%}.\n\n"
        + _table(
            ["policy", "capacity", "goodput, 1/s", "P50, s", "P90, s", "P99, s", "hit rate", "load CV", "router, ms"],
            details,
        )
        + "\n"
    )


def _goals(groups: dict[tuple[str, int], list[dict[str, Any]]]) -> str:
    columns = [
        "workload, replicas",
        "capacity at the knee, dual_map / best other",
        "over least_loaded",
        "best at speeds",
        "rate carried at 90 %, 1/s, dual_map / best other",
        "hits of affinity's at the knee (goal 90 %)",
        "CV of least_loaded's at the slowest speed (goal 1.3)",
        "at the knee",
    ]
    rows = [_goal(f"{name}, {replicas}", runs) for (name, replicas), runs in groups.items()]
    return (
        f"## dual_map against the goals\n\n{_table(columns, rows)}\n\nPublished, on 8 Ascend 910B: 1.41 to 1.8 times "
        "the capacity on conversation, up to 2.25 on tools and agents. Beyond its knee a policy's queues only grow: "
        "there all replicas of least_loaded are equally far behind, so its CV says little.\n"
    )


def _goal(title: str, runs: list[dict[str, Any]]) -> list[str]:
    policies = knee(runs)["policies"]
    ours = policies["dual_map"]
    others = {policy: found["capacity"] for policy, found in policies.items() if policy != "dual_map"}
    best = max(others, key=lambda policy: others[policy])
    carried = {policy: _carried(runs, policy) for policy in policies}
    hits = ours["hit_rate"] / policies["affinity"]["hit_rate"]
    won = [
        f"{run['speed']:g}"
        for run in runs
        if run["policies"]["dual_map"]["capacity"] > max(run["policies"][other]["capacity"] for other in others)
    ]
    first, last = (_cv(run) for run in (runs[0], knee(runs)))
    return [
        title,
        f"{ours['capacity']:.1%} / {others[best]:.1%} ({best})",
        _ratio(ours["capacity"], others["least_loaded"]),
        ", ".join(won) or "none",
        f"{carried['dual_map']:.1f} / {max(carried[policy] for policy in others):.1f}",
        f"{hits:.1%}{'' if hits >= 0.9 else ' (missed)'}",
        f"{first:.2f}{'' if first <= 1.3 else ' (missed)'}",
        f"{last:.2f}{'' if last <= 1.3 else ' (missed)'}",
    ]


def _routers(results: dict[str, Any], groups: dict[tuple[str, int], list[dict[str, Any]]]) -> str:
    """Each policy with several routers: capacity by speed, and what that costs at the knee of one router."""
    by_workload: dict[str, list[dict[str, Any]]] = {}
    for run in results["routers"]:
        by_workload.setdefault(run["workload"], []).append(run)
    count = results["routers"][0]["settings"]["routers"]
    parts = [
        f"## {count} routers that do not talk, 8 replicas\n\nEach gets every {count}th request, knows of the caches "
        "only what it sent there itself, and learns twice a second what each replica has to compute. Effective "
        "capacity by speed, the best is bold; then, at the knee of one router, hit rate and capacity with one router "
        f"and with {count}. Commit {str(results['routers_environment']['commit'])[:10]}.\n"
    ]
    for name, runs in by_workload.items():
        one = knee(groups[name, 8])
        several = next(run for run in runs if run["speed"] == one["speed"])
        best = [max(policy["capacity"] for policy in run["policies"].values()) for run in runs]
        rows = [
            [
                policy,
                *(_bold(run["policies"][policy]["capacity"], top) for run, top in zip(runs, best)),
                f"{one['policies'][policy]['hit_rate']:.1%} to {found['hit_rate']:.1%}",
                f"{one['policies'][policy]['capacity']:.1%} to {found['capacity']:.1%}",
            ]
            for policy, found in several["policies"].items()
        ]
        speeds = [f"{run['speed']:g}" for run in runs]
        at = f"at {one['speed']:g}"
        parts.append(_table([name, *speeds, f"hit rate {at}", f"capacity {at}"], rows) + "\n")
    return "\n".join(parts)


def _cv(run: dict[str, Any]) -> float:
    return run["policies"]["dual_map"]["load_cv"] / run["policies"]["least_loaded"]["load_cv"]


def _carried(runs: list[dict[str, Any]], policy: str) -> float:
    """The highest measured rate at which a policy serves 90 % within the SLO, requests per second; 0 for none."""
    rates = [run["settings"]["requests_per_second"] for run in runs if run["policies"][policy]["capacity"] >= ENOUGH]
    return max(rates, default=0.0)


def _variants(results: dict[str, Any]) -> str:
    parts = ["## Options of dual_map, 8 replicas\n\nEffective capacity by speed; nothing of this changed a default.\n"]
    for name in dict.fromkeys(run["workload"] for run in results["variants"]):
        runs = [run for run in results["variants"] if run["workload"] == name]
        speeds = list(dict.fromkeys(run["speed"] for run in runs))
        found = {(run["variant"], run["speed"]): run["policies"]["dual_map"]["capacity"] for run in runs}
        labels = list(dict.fromkeys(run["variant"] for run in runs))
        best = [max(found[label, speed] for label in labels) for speed in speeds]
        rows = [[label, *(_bold(found[label, speed], top) for speed, top in zip(speeds, best))] for label in labels]
        parts.append(_table([name, *(f"{speed:g}" for speed in speeds)], rows) + "\n")
    return "\n".join(parts)


def _million(found: dict[str, Any]) -> str:
    return (
        "## One million requests, 64 replicas\n\ndual_map, generated requests at 60 per second: "
        f"{found['cpu_seconds']:.0f} s of one core ({found['wall_seconds']:.0f} s by the clock of a machine that "
        f"others used), {found['router_ms']:.3f} ms in the router per request, {found['capacity']:.1%} within the SLO. "
        f"Its memory of prefixes held at most {found['entries']:,} entries; the bound is 138,192: 64 caches of "
        "1,953 blocks, 3,200 counts and 10,000 lengthened keys.\n"
    )


def _ratio(over: float, under: float) -> str:
    return f"{over / under:.2f}" if under >= 0.01 else f"{over:.1%} to {under:.1%}"


def _bold(value: float, best: float) -> str:
    return f"**{value:.1%}**" if value == best > 0 else f"{value:.1%}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
