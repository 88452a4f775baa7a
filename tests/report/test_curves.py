"""Curves over seeds, and how a method looks."""

import math

import numpy as np
import pytest
from made_up_results import METHODS, made_up_results

from equipoise.report.curves import WINDOWS, at_least, lines, over_seeds, rounded, scaled, windows
from equipoise.report.looks import looks


def test_over_seeds_joins_at_the_x_of_the_first():
    curve = over_seeds([[(1, 2.0), (3, 4.0)], [(0, 0.0), (2, 6.0), (3, 8.0)]])
    assert curve.x.tolist() == [1, 3]
    assert curve.mean.tolist() == [2.5, 6.0]  # 3 and 8 of the second
    assert curve.low.tolist() == [2.0, 4.0]
    assert curve.high.tolist() == [3.0, 8.0]
    assert curve.seeds == 2


def test_windows_average_neighbours():
    assert windows([(1, 5.0), (2, 7.0)]) == [(1, 5.0), (2, 7.0)]
    points = windows([(step, 2.0 * step) for step in range(2 * WINDOWS)])
    assert len(points) == WINDOWS
    assert points[:2] == [(0.5, 1.0), (2.5, 5.0)]


def test_scaled_and_at_least_leave_the_rest():
    curves = {"switch": over_seeds([[(10, 0.0), (20, 3.0)]])}
    changed = at_least(scaled(curves, 10.0), 0.5)["switch"]
    assert changed.x.tolist() == [1.0, 2.0]
    assert changed.mean.tolist() == changed.low.tolist() == changed.high.tolist() == [0.5, 3.0]


def test_several_seeds_get_a_band_below_all_lines():
    curves = {
        "switch": over_seeds([[(1, 2.0), (2, 3.0)], [(1, 4.0), (2, 7.0)]]),
        "quantile": over_seeds([[(1, 1.0), (2, 1.5)]]),
    }
    band, switch, quantile = lines(made_up_results(1), curves)
    assert band["meta"] == {"method": "switch", "band": True}
    assert (band["x"], band["y"]) == ([1, 2, 2, 1], [4, 7, 3, 2])
    assert (switch["x"], switch["y"]) == ([1, 2], [3, 5])
    assert switch["meta"]["label"] == "switch, mean of 2 seeds"
    assert quantile["meta"]["label"] == "quantile"


def test_a_diverged_seed_leaves_a_gap_and_not_an_error():
    band, line = lines(made_up_results(1), {"switch": over_seeds([[(1, 2.0), (2, math.nan)], [(1, 4.0), (2, 7.0)]])})
    assert line["y"] == [3.0, None]
    assert (band["x"], band["y"]) == ([1, 1], [4, 2])


def test_rounded():
    assert rounded([123456.0, 0.000123456, math.inf, math.nan]) == [123500.0, 0.0001235, None, None]
    assert rounded(np.array([1.23456]), digits=2) == [1.2]


def test_looks_are_the_baselines_grey_and_unlike_each_other():
    results = made_up_results(2)
    several = looks(results)
    assert several["unbalanced"] == {"label": "unbalanced", "colour": "--baseline", "dash": "solid"}
    assert several["switch"] == {"label": "switch", "colour": "--method-1", "dash": "solid"}
    assert several["expert_choice"]["label"] == "expert_choice \u2020"
    assert len({look["colour"] for look in several.values()}) == len(METHODS)


def test_more_methods_than_colours_change_the_dash():
    run = made_up_results(1)["runs"][1]
    results = {"baseline": "unbalanced", "runs": [run | {"method": f"m{number}"} for number in range(24)]}
    several = looks(results)
    assert (several["m6"]["colour"], several["m6"]["dash"]) == ("--method-1", "dash")
    assert len({(look["colour"], look["dash"]) for look in several.values()}) == 24


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_method_has_one_line(seeds):
    results = made_up_results(seeds)
    curves = {method: over_seeds([[(1, 2.0)]]) for method in METHODS}
    assert [trace["meta"]["method"] for trace in lines(results, curves)] == list(METHODS)
