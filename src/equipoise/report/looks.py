"""How a method looks: the same label, colour and dash in every picture."""

from __future__ import annotations

from equipoise.report.columns import DAGGER
from equipoise.report.results import Results, runs_by_method

COLOURS = 6  # page.css has as many, beside the baseline's grey
DASHES = ("solid", "dash", "dot", "dashdot")


def looks(results: Results) -> dict[str, dict[str, str]]:
    """Method to its label, the CSS variable of its colour and its dash.

    The baseline is grey. The others take the colours in turn; each further round has another dash.
    """
    looks_of = {}
    others = 0
    for method, runs in runs_by_method(results).items():
        turn, colour = divmod(others, COLOURS)
        is_baseline = method == results["baseline"]
        looks_of[method] = {
            "label": method if all(run["causal"] for run in runs) else f"{method} {DAGGER}",
            "colour": "--baseline" if is_baseline else f"--method-{colour + 1}",
            "dash": "solid" if is_baseline else DASHES[turn % len(DASHES)],
        }
        others += not is_baseline
    return looks_of
