"""``docs/evidence/simulate.md`` from the results of ``benchmarks/simulate.py``."""

from statistics import mean
from typing import Any

Found = dict[str, Any]

HEAD = """# The simulator, held against published figures

Every figure named "simulated" comes from `equipoise simulate`: the real planners on a modelled machine. Made by

```
python benchmarks/simulate.py
```

in {seconds:.0f} s of one core ({machine}). The settings stand in `benchmarks/simulate_settings.json` (SHA-256
`{digest}`...) and were fixed before the comparison was run; neither they nor the fitted constants were changed
after it.
"""

LLEP = """
## LLEP's table

Source: arXiv 2601.17111, forward pass of one layer on eight H200, speed-up over plain expert parallelism. Three
constants (`row_passes`, `link_efficiency`, `weight_efficiency`) were fitted to the row of gpt-oss-120b; the other
rows are predictions. In the balanced column both sides run the same plan, so that the model says 1; the measured
1.07, 0.92 and 1.03 show how far the measurements themselves scatter.
"""

LLEP_WHY = """
The order is right, and so is the growth with the skew, but the predictions are too high: LLEP's step is slower on
DeepSeek-V3 and Kimi-K2 than the model says. What is missing is a fixed cost. Fitted to these rows afterwards, as a
diagnosis and not as a prediction, a single constant explains most of it:
"""

DIAGNOSIS_WHY = """
LLEP's reference code walks through a rank's experts one by one, in Python, and waits for the device in between; a
cost that grows with the number of experts (256 and 384, against 128 in the fitted row) would look like this. That is
a guess: the published ratios do not tell times. In Kimi-K2's row the published 1.48 for 30 % on one expert stands
apart from its neighbours, 1.94 and 2.74; no smooth model meets it.
"""

HECATE = """
## Hecate's ratios

Source: arXiv 2502.02581. Widths, tokens and loads are not known, so the skew is swept; the published means are over
several baselines, not over plain expert parallelism alone.
"""

HECATE_WHY = """
Too low everywhere but for strong skew on 16 devices. Only one expert's weights hide behind attention with the assumed
width (1,024) and a weight bandwidth that was fitted to LLEP's point-to-point transfers, whereas Hecate moves weights
by tuned collectives; re-sharding over layers, which alone brings 1.34 to 1.42 in the paper, is not part of the
simulated policy.
"""

MOETUNER = """
## MoETuner's ratios

Source: arXiv 2502.06643, Mixtral-8x7B, expert parallelism over four ranks. The routing of its data sets is not known,
so the skew is swept. The tail is the busiest rank's rows.
"""

MOETUNER_WHY = """
Too low. The policy only evens out loads, and with two experts per rank there is little to even out; MoETuner also
follows tokens from layer to layer, gives ranks different numbers of experts per layer, and its loads may be more
skewed.
"""

BYTESCALE = """
## ByteScale's balance

Source: arXiv 2502.21231, LLaMA-7B, 2M tokens of context, 1,024 GPUs: balancing took the step from 2.01 to 3.69 times
the baseline, a ratio of 1.84. Lengths are log-normal through the two percentiles that are published; the capacity of
a rank is not, and decides.
"""

POLICIES = """
## All policies at 8, 64, 512 and 4,096 ranks

{model}, 58 layers, training, 8,192 tokens per rank, H200 nodes of eight, 256 experts. Groups have at most 256 ranks;
the others repeat them. Time of a step in ms and, in brackets, the speed-up over `native`; `!` marks a policy whose
experts and rows exceed a rank's memory. The last two columns are equal because the reduction between groups hides
behind the backward pass.
"""

LARGEST = """
## The largest simulation

{policies} policies on {ranks:,} ranks in groups of {ep}, {layers} layers: {cpu:.0f} s of one core ({wall:.0f} s on a
clock, on a busy machine).
"""


def page(found: Found, given: Found) -> str:
    """The whole page."""
    seconds = sum(row["cpu_seconds"] for row in found["policies"]) + found["largest"]["cpu_seconds"]
    head = HEAD.format(seconds=seconds, machine=found["environment"]["cpu"], digest=found["settings_sha256"][:16])
    parts = [
        head,
        LLEP,
        _llep(found["llep"]),
        LLEP_WHY,
        _diagnosis(found["diagnosis"]),
        DIAGNOSIS_WHY,
        HECATE,
        _swept(found["hecate"], given["hecate"]["zipf"], "simulated"),
        HECATE_WHY,
        MOETUNER,
        _swept(found["moetuner"], given["moetuner"]["zipf"], "simulated"),
        "\nThe busiest rank's rows, less by:\n",
        _swept(found["moetuner"], given["moetuner"]["zipf"], "simulated_tail", "published_tail"),
        MOETUNER_WHY,
        BYTESCALE,
        _bytescale(found["bytescale"]),
        POLICIES.format(model="DeepSeek-V3"),
        *[
            _policies(found["policies"], workload)
            for workload in dict.fromkeys(r["workload"] for r in found["policies"])
        ],
        LARGEST.format(
            policies=found["largest"]["policies"],
            ranks=found["largest"]["ranks"],
            ep=found["largest"]["ep"],
            layers=found["largest"]["layers"],
            cpu=found["largest"]["cpu_seconds"],
            wall=found["largest"]["wall_seconds"],
        ),
    ]
    return "".join(parts)


def _llep(points: list[Found]) -> str:
    rows = []
    for model in dict.fromkeys(point["model"] for point in points):
        own = [point for point in points if point["model"] == model]
        errors = [point["simulated"] / point["published"] - 1 for point in own]
        kind = "fitted" if own[0]["fitted"] else "predicted"
        for point, error in zip(own, errors):
            _, share, hot = point["workload"].split(":")
            cells = [f"{float(share):.0%} on {hot}", f"{point['published']:.2f}", f"{point['simulated']:.2f}"]
            rows.append([model, kind, *cells, f"{error:+.0%}"])
        spread = f"{min(errors):+.0%} to {max(errors):+.0%}"
        rows.append(
            [f"**{model}**", kind, "mean of the errors' sizes", "", "", f"**{mean(map(abs, errors)):.0%}** ({spread})"]
        )
    return _table(["model", "", "load", "published", "simulated", "error"], rows)


def _diagnosis(points: list[Found]) -> str:
    rows = [
        [
            p["model"],
            f"`{p['constant']}` {1e3 * p['value']:.2f} ms",
            f"{p['error_before']:.0%}",
            f"{p['error_after']:.0%}",
        ]
        for p in points
    ]
    return _table(["model", "fitted afterwards", "mean error before", "after"], rows)


def _swept(points: list[Found], zipf: list[float], key: str, published: str = "published") -> str:
    rows = []
    for point in points:
        share = key.endswith("tail")
        cells = [f"{value:.0%}" if share else f"{value:.2f}" for value in point[key].values()]
        best = min(abs(value / point[published] - 1) for value in point[key].values())
        shown = f"{point[published]:.0%}" if share else f"{point[published]:.3g}"
        rows.append([point["machine"], shown, *cells, f"{best:.0%}"])
    return _table(["machine", "published", *[f"Zipf {value}" for value in zipf], "least error"], rows)


def _bytescale(points: list[Found]) -> str:
    rows = [
        [
            f"{p['capacity']:,}",
            f"{p['published']:.2f}",
            f"{p['simulated']:.2f}",
            f"{p['simulated'] / p['published'] - 1:+.0%}",
        ]
        for p in points
    ]
    return _table(["tokens that a rank holds", "published", "simulated", "error"], rows)


def _policies(points: list[Found], workload: str) -> str:
    own = [point for point in points if point["workload"] == workload]
    rows = []
    for name in own[0]["policies"]:
        cells = [point["policies"][name] for point in own]
        rows.append(
            [
                f"`{name}`",
                *(f"{1e3 * c['seconds']:,.0f} ({c['speedup']:.2f}){'' if c['fits'] else ' !'}" for c in cells),
            ]
        )
    heads = [f"{point['ranks']:,} ranks" for point in own]
    return f"\nWorkload `{workload}`:\n" + _table(["policy", *heads], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
