"""The pictures' numbers."""

import math

import plotly.graph_objects as go
import pytest
from made_up_results import DOMAINS, FLOPS, METHODS, STEPS, TOKENS_PER_STEP, made_up_results

from equipoise.report import figures
from equipoise.report.figures import domain_layers, domain_plot, load_plots, loss_plot, max_vio_plot, noise_floor


def trace_of(plot: dict, view: str, method: str) -> dict:
    """The line of a method, not its band."""
    traces = plot["views"][view]["traces"]
    return next(trace for trace in traces if trace["meta"]["method"] == method and "band" not in trace["meta"])


@pytest.mark.parametrize("seeds", [1, 3])
def test_plotly_knows_every_property(seeds):
    results = made_up_results(seeds)
    plots = [loss_plot(results), max_vio_plot(results), domain_plot(results), *load_plots(results).values()]
    for plot in plots:
        for view in plot["views"].values():
            data = [plot["trace"] | trace for trace in view["traces"]]
            figure = go.Figure(data=data, layout=plot["layout"] | view.get("layout", {}))  # fails for an unknown one
            assert len(figure.data) == len(view["traces"])


def test_validation_loss_over_flops():
    results = made_up_results(1)
    plot = loss_plot(results)
    trace = trace_of(plot, "validation", "switch")
    run = results["runs"][1]
    assert trace["x"][-1] == FLOPS / 1e14
    assert trace["y"] == [pytest.approx(point["loss"], rel=1e-4) for point in run["validation"]]
    assert plot["layout"]["xaxis"]["range"] == pytest.approx([0.98 * 0.2 * 3.1, 1.01 * 3.1], rel=1e-3)


def test_the_range_shows_what_follows_the_steep_fifth():
    results = made_up_results(1)
    late = [point["loss"] for run in results["runs"] for point in run["validation"] if point["flops"] >= 0.2 * FLOPS]
    low, high = loss_plot(results)["views"]["validation"]["layout"]["yaxis"]["range"]
    assert low < min(late) < max(late) < high
    assert high - low == pytest.approx(1.12 * (max(late) - min(late)), rel=1e-2)


def test_a_single_point_still_has_a_range():
    results = made_up_results(1)
    results["runs"] = results["runs"][:1]
    results["runs"][0]["validation"] = [{"step": STEPS, "flops": FLOPS, "loss": 1.5}]
    views = loss_plot(results)["views"]
    assert views["validation"]["layout"]["yaxis"]["range"] == [1.49, 1.51]
    assert views["difference"]["layout"]["yaxis"]["range"] == [-0.01, 0.01]


def test_difference_is_to_the_baseline_of_the_same_seed_at_the_same_flops():
    results = made_up_results(2)
    for run in results["runs"]:
        is_switch = run["method"] == "switch"
        offset = run["seed"] + is_switch * (0.5 + 0.5 * run["seed"])  # seeds differ by 1, the methods by 0.5 and by 1
        shares = (0.25, 0.5, 1.0) if is_switch else (0.25, 1.0)
        run["validation"] = [{"step": 1, "flops": share * FLOPS, "loss": 3 + offset + share} for share in shares]
    plot = loss_plot(results)
    assert trace_of(plot, "difference", "switch")["y"] == [0.75, 0.75, 0.75]
    assert trace_of(plot, "difference", "unbalanced")["y"] == [0, 0]


def test_without_the_baseline_there_is_no_view_of_differences():
    results = made_up_results(1)
    results["runs"] = results["runs"][1:]
    assert list(loss_plot(results)["views"]) == ["validation", "training"]


def test_a_diverged_run_has_gaps():
    results = made_up_results(1)
    for point in results["runs"][1]["validation"][5:]:
        point["loss"] = math.nan
    plot = loss_plot(results)
    assert trace_of(plot, "validation", "switch")["y"][4:] == [pytest.approx(1.78, abs=0.1), *[None] * 5]
    assert all(math.isfinite(bound) for bound in plot["views"]["validation"]["layout"]["yaxis"]["range"])


def test_max_vio_is_drawn_within_its_axis():
    results = made_up_results(1)
    assert results["runs"][5]["curve"][-1]["max_vio"] < 0.01
    plot = max_vio_plot(results)
    assert trace_of(plot, "", "expert_choice")["y"][-1] == 0.01
    mean = sum(point["max_vio"] for point in results["runs"][0]["curve"][:3]) / 3
    assert trace_of(plot, "", "unbalanced")["y"][0] == pytest.approx(mean, rel=1e-4)
    assert trace_of(plot, "", "unbalanced")["x"][0] == 3  # the mean of steps 1, 3 and 5


def test_noise_floor():
    # the specification's example: T = 4096, E = 64, K = 8
    results = {
        "settings": {"model": {"top_k": 8}},
        "runs": [{"tokens": 4096 * 10, "steps": 10, "per_layer": [{"load": [1] * 64}]}],
    }
    assert noise_floor(results) == pytest.approx(0.119, abs=5e-4)
    results["runs"].append(results["runs"][0] | {"steps": 5})
    assert noise_floor(results) is None


def test_the_floor_is_drawn_where_it_is():
    layout = max_vio_plot(made_up_results(1))["layout"]
    floor = math.sqrt(2 * math.log(16) * (1 - 2 / 16) / (TOKENS_PER_STEP * 2 / 16))
    assert layout["shapes"][0]["y0"] == layout["shapes"][0]["y1"] == pytest.approx(floor)
    assert layout["annotations"][0]["y"] == pytest.approx(math.log10(floor))
    assert made_up_results(1)["runs"][0]["steps"] == STEPS


def test_load_is_relative_to_the_mean_of_the_layer():
    results = made_up_results(2)
    results["runs"][0]["per_layer"][1]["load"] = [0, 10, 20, 50]
    plot = load_plots(results)["unbalanced"]
    trace = plot["views"][""]["traces"][0]
    assert trace["z"][1] == [0, 0.5, 1.0, 2.5]
    assert (trace["zmin"], trace["zmax"]) == (0, 2)
    assert trace["meta"]["rows"] == [f"layers.{layer}.moe" for layer in range(4)]
    assert plot["layout"]["yaxis"]["ticktext"] == ["0", "1", "2", "3"]


def test_domain_shares_are_relative_to_an_equal_share():
    results = made_up_results(1)
    results["runs"][2]["per_layer"][3]["domain_load"]["letters"] = [0] * 12 + [30, 10, 0, 40]
    results["runs"][2]["per_layer"][3]["domain_load"]["recipes"] = [0] * 16
    plot = domain_plot(results)
    cells = plot["views"]["2/3"]["traces"][0]["z"]
    assert cells[list(DOMAINS).index("letters")] == [0] * 12 + [6, 2, 0, 8]
    assert cells[list(DOMAINS).index("recipes")] == [None] * 16
    assert set(plot["views"]) == {f"{method}/{layer}" for method in range(len(METHODS)) for layer in range(4)}


def test_names_of_domains_are_escaped_and_cut():
    name = "<script>alert(1)</script>"
    plot = domain_plot(made_up_results(1, domains={name: 0.5, "b": 0.5}))
    assert plot["layout"]["yaxis"]["ticktext"] == ["&lt;script&gt;alert(1\u2026", "b"]
    assert plot["trace"]["meta"]["rows"][0] == "&lt;script&gt;alert(1)&lt;/script&gt;"


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["layers.10.moe", "layers.11.moe"], ["10", "11"]),
        (["encoder.0.moe", "decoder.1.moe"], ["encoder.0", "decoder.1"]),
        (["layers.3.moe"], ["layers.3.moe"]),
        (["a.b", "c"], ["a.b", "c"]),
    ],
)
def test_layers_are_named_by_what_tells_them_apart(names, short):
    results = made_up_results(1, layers=len(names))
    for layer, name in zip(results["runs"][0]["per_layer"], names):
        layer["name"] = name
    assert load_plots(results)["unbalanced"]["layout"]["yaxis"]["ticktext"] == short


def test_many_layers_are_thinned_evenly(monkeypatch):
    results = made_up_results(1, layers=7, experts=16)
    assert domain_layers(results) == [0, 1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(figures, "CELLS", 3 * 16 * len(DOMAINS) * len(METHODS))
    assert domain_layers(results) == [0, 3, 6]
    assert {key.split("/")[1] for key in domain_plot(results)["views"]} == {"0", "3", "6"}
