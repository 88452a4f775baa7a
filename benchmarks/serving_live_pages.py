"""The page and the picture of the live measurement, from its JSON."""

from __future__ import annotations

import html
from typing import Any

from equipoise.report.document import document

Runs = list[dict[str, Any]]
COLUMNS = {
    "capacity": ("capacity", ".1%"),
    "goodput": ("goodput, 1/s", ".2f"),
    "ttft_p50": ("P50, s", ".2f"),
    "ttft_p90": ("P90, s", ".2f"),
    "ttft_p99": ("P99, s", ".2f"),
    "hit_rate": ("hit rate", ".1%"),
    "load_cv": ("load CV", ".2f"),
}
GOALS = {
    "hit_rate": ("affinity", "hits of affinity's (goal: at least 90 %)", 0.9, 1),
    "load_cv": ("least_loaded", "CV of least_loaded's (goal: at most 1.3)", 1.3, -1),
}

HEAD = """# Serving, measured: Ray Serve with a small model

Measured, not simulated: a really running [Ray Serve](https://docs.ray.io/en/latest/serve/) 2.60, {replicas} replicas of
the [small model](../../examples/serving/engine.py) ({layers} layers of width {width}, random weights, a real prefix
cache of {cache:,} tokens) behind OpenAI's API, {clients} client processes, answers streamed. Two cores of an {cpu}
carry all of it. Made by

    python benchmarks/serving_live.py

from [generated requests](../../src/equipoise/serving/workload.py) whose prompts are a {shorter}th and whose answers a
{answers}th as long, 2,150 and 11 tokens on average. The SLO is {slo:g} s to the first token, the router's time per
prompt token {prefill:g} s. A policy is measured on a server of its own, at every rate, after {warmup} requests of
warm-up; each of {rounds} rounds has requests of its own, the same for all policies, and turns their order around. The
constants were set before the first run and not changed after one; the rates were chosen after a look at where the knee
lies. Commit {commit}, {date}. `power_of_two` is Ray Serve's own router.

A figure is the mean of the rounds; in parentheses, how far the furthest round lies from it: differences between
policies that are not larger say little. Replicas, router, proxy and clients share two cores, so a busy replica slows
the others down, which no cluster does: what helps to spread load is worth less here than on machines of their own.
`load CV` is read off the clients' records: per second, the spread of the prompt tokens that each replica still had to
compute, over their mean.
"""


def tables(found: dict[str, Any]) -> str:
    """Markdown."""
    environment, settings = found["environment"], found["settings"]
    head = HEAD.format(
        replicas=settings["replicas"],
        layers=settings["engine"]["layers"],
        width=settings["engine"]["width"],
        cache=settings["engine"]["cache_tokens"],
        clients=settings["clients"],
        cpu=environment["cpu"],
        shorter=settings["shorter"],
        answers=settings["shorter_answers"],
        slo=settings["router"]["slo"],
        prefill=settings["router"]["prefill_seconds"],
        warmup=settings["warmup"],
        rounds=len({run["round"] for run in found["runs"]}),
        commit=str(environment["commit"])[:10],
        date=environment["date"],
    )
    rates = sorted({run["rate"] for run in found["runs"]})
    parts = [_rate([run for run in found["runs"] if run["rate"] == rate], rate) for rate in rates]
    return "\n".join([head, *parts, _faults(found["faults"])])


def _by_policy(runs: Runs) -> dict[str, Runs]:
    policies: dict[str, Runs] = {}
    for run in runs:
        policies.setdefault(run["policy"], []).append(run)
    return policies


def _mean(runs: Runs, key: str) -> float:
    return sum(run[key] for run in runs) / len(runs)


def _rate(runs: Runs, rate: float) -> str:
    policies = _by_policy(runs)
    lines = [
        "| policy | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "| --- |" + " ---: |" * len(COLUMNS),
    ]
    for policy, own in policies.items():
        lines.append(f"| {policy} | " + " | ".join(_cell(own, key) for key in COLUMNS) + " |")
    ranked = sorted(policies, key=lambda policy: -_mean(policies[policy], "capacity"))
    best = f"Most within the SLO: {ranked[0]}, then {ranked[1]}; dual_map is number {ranked.index('dual_map') + 1}."
    goals = " ".join(_goal(policies, key) for key in GOALS)
    bound = f"One endless cache would find {_mean(runs, 'hit_rate_bound'):.1%}."
    return "\n".join([f"## {rate:g} requests per second", "", *lines, "", f"{bound} {best} {goals}", ""])


def _cell(runs: Runs, key: str) -> str:
    form = COLUMNS[key][1]
    mean = _mean(runs, key)
    return f"{mean:{form}} ({max(abs(run[key] - mean) for run in runs):{form}})"


def _goal(policies: dict[str, Runs], key: str) -> str:
    other, words, goal, sign = GOALS[key]
    ratio = _mean(policies["dual_map"], key) / _mean(policies[other], key)
    return f"dual_map has {ratio:.2f} of the {words}{'' if sign * ratio >= sign * goal else ': missed'}."


def _faults(faults: dict[str, Any]) -> str:
    answers = faults["answers"]
    lost = sum(not answer["complete"] for answer in answers)
    twice = sum(answer["ends"] > 1 for answer in answers)
    moved = sum(len(answer["replicas"]) > 1 for answer in answers)
    refused = sum(answer["refused"] > 0 for answer in answers)
    lines = ["| at, s | what happens | longest first token of the next 15 s, s |", "| ---: | --- | ---: |"]
    for fault in faults["faults"]:
        after = [answer["ttft"] for answer in answers if 0 <= answer["due"] - fault["time"] < 15]
        lines.append(f"| {fault['time']:.0f} | {fault['what']} | {max(after, default=0):.1f} |")
    within = sum(answer["ttft"] <= faults["slo"] for answer in answers) / len(answers)
    return "\n".join(
        [
            "## Replicas that come, die and hang",
            "",
            f"dual_map, {faults['rate']:g} requests per second. A replica that hangs is given up after "
            f"{faults['patience']:g} s here (60 by default), and 3 s in which it is asked; Ray Serve starts new ones "
            "by itself. The first seconds still carry a warm-up of 60 requests.",
            "",
            *lines,
            "",
            f"Of {len(answers)} requests **{lost} were lost and {twice} answered twice**; {moved} answers broke off "
            f"and went on with another replica, {refused} requests were refused with 503 while all were down and sent "
            f"again by the client, {within:.1%} had their first token within the SLO.",
            "",
            "![Time to first token of every request while replicas come, die and hang](../images/serving_faults.png)",
            "",
        ]
    )


KINDS = ("answered by one replica", "went on with another", "refused with 503 first")


def picture(faults: dict[str, Any]) -> str:
    """A self-contained page: every request's time to first token over the run."""
    groups: dict[str, Runs] = {kind: [] for kind in KINDS}
    for answer in faults["answers"]:
        groups[KINDS[2] if answer["refused"] else KINDS[len(answer["replicas"]) > 1]].append(answer)
    looks = {
        kind: {"label": kind, "colour": f"--method-{place + 1}", "dash": "solid"} for place, kind in enumerate(KINDS)
    }
    legend = "".join(
        f'<button type="button" aria-pressed="true" data-method="{kind}"><svg width="22" height="8" aria-hidden="true">'
        f'<circle cx="11" cy="4" r="4" fill="var({looks[kind]["colour"]})"/></svg>{kind}: {len(group)}</button>'
        for kind, group in groups.items()
    )
    happened = "".join(f"<li>{fault['time']:.0f} s: {html.escape(fault['what'])}</li>" for fault in faults["faults"])
    body = (
        '<header><p class="kicker">Equipoise on Ray Serve</p><h1>Replicas that come, die and hang</h1>'
        f'<p class="lead">{len(faults["answers"])} requests, '
        f"{sum(not answer['complete'] for answer in faults['answers'])} lost.</p></header>"
        "<section><h2>Time to first token</h2><p>Each point is a request; the dotted lines are faults, the level one "
        f'is the SLO.</p><ul>{happened}</ul><figure><div class="controls"><div class="legend" role="group">{legend}'
        '</div></div><div class="plot" id="ttft" role="img" aria-label="Time to first token"></div></figure></section>'
    )
    return document("Equipoise: faults on Ray Serve", body, {"looks": looks, "plots": {"ttft": _plot(groups, faults)}})


def _plot(groups: dict[str, Runs], faults: dict[str, Any]) -> dict[str, Any]:
    upright = [
        {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": fault["time"], "x1": fault["time"]}
        | {"line": {"dash": "dot"}}
        for fault in faults["faults"]
    ]
    level = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": faults["slo"], "y1": faults["slo"]}
    return {
        "trace": {"type": "scatter", "mode": "markers", "hovertemplate": "%{x:.1f} s: %{y:.2f} s<extra></extra>"},
        "layout": {
            "xaxis": {"title": {"text": "Sent at, s"}},
            "yaxis": {"title": {"text": "Time to first token, s"}, "type": "log", "dtick": 1},
            "hovermode": "closest",
            "shapes": [*upright, level | {"line": {"dash": "dash"}}],
        },
        "views": {
            "": {
                "traces": [
                    {
                        "meta": {"method": kind, "band": False},
                        "x": [answer["due"] for answer in group],
                        "y": [answer["ttft"] for answer in group],
                    }
                    for kind, group in groups.items()
                ]
            }
        },
    }
