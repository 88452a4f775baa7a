"""Rows, power and the headline."""

import copy
import math

import pytest
from made_up_results import made_up_results

from equipoise.report.results import headline, perplexity_digits, power, summarise


def with_perplexities(values: dict[str, list[float]]) -> dict:
    """Results of the named methods with these perplexities, one per seed; all else is made up."""
    results = made_up_results(seeds=1)
    runs = {run["method"]: run for run in results["runs"]}
    results["runs"] = [
        copy.deepcopy(runs[method]) | {"seed": seed, "perplexity": value}
        for method, several in values.items()
        for seed, value in enumerate(several)
    ]
    return results | {"power": power(results)}


def test_rows_keep_the_order_of_the_runs():
    results = made_up_results(seeds=2)
    results["runs"].reverse()
    methods = ["expert_choice", "quantile", "loss_free", "global_batch", "switch", "unbalanced"]
    assert [row.method for row in summarise(results)] == methods


def test_one_seed_has_no_spread():
    row = summarise(with_perplexities({"unbalanced": [5.0], "quantile": [4.0]}))[1]
    assert (row.seeds, row.perplexity) == (1, 4.0)
    spreads = (row.perplexity_sd, row.difference, row.difference_se, row.difference_is_clear)
    assert spreads == (None, None, None, None)


def test_means_spread_and_paired_difference():
    results = with_perplexities({"unbalanced": [5.0, 6.0, 7.0], "quantile": [4.0, 5.5, 5.5]})
    results["runs"][3]["tokens_per_second"] = 100.0
    results["runs"][4]["tokens_per_second"] = 200.0
    results["runs"][5]["tokens_per_second"] = 600.0
    baseline, row = summarise(results)
    assert (baseline.perplexity, baseline.perplexity_sd, baseline.difference) == (6.0, 1.0, None)
    assert row.perplexity == 5.0
    assert row.perplexity_sd == pytest.approx(math.sqrt(0.75))
    assert row.difference == pytest.approx(-1.0)  # of -1, -0.5, -1.5
    assert row.difference_se == pytest.approx(0.5 / math.sqrt(3))
    assert row.difference_is_clear is False  # -1 / 0.2887 = -3.46, within 4.303
    assert row.tokens_per_second == 300.0
    assert row.experts == 64


def test_pairs_need_the_same_seed():
    results = with_perplexities({"unbalanced": [5.0, 6.0], "quantile": [4.0, 5.0]})
    for run in results["runs"][2:]:
        run["seed"] += 10
    assert summarise(results)[1].difference is None


def test_without_the_baseline_there_is_no_difference():
    rows = summarise(with_perplexities({"switch": [5.0, 6.0], "quantile": [4.0, 5.0]}))
    assert [row.difference for row in rows] == [None, None]


def test_a_diverged_run_leaves_no_spread():
    row = summarise(with_perplexities({"unbalanced": [5.0, 6.0], "quantile": [4.0, math.inf]}))[1]
    assert (row.perplexity, row.perplexity_sd, row.difference) == (math.inf, None, None)


def test_power_of_one_seed():
    assert "no difference in perplexity can be claimed" in power(made_up_results(seeds=1))
    assert "--seeds 3" in power(made_up_results(seeds=1))


def test_power_names_the_smallest_visible_difference():
    results = with_perplexities({"unbalanced": [1.0, 3.0], "quantile": [2.0, 6.0]})  # 14.08: see test_seeds
    assert power(results) == (
        "With 2 seeds, differences in perplexity under 14 cannot be seen with this budget "
        "(95 % confidence, 80 % power)."
    )


def test_power_leaves_out_what_diverged():
    values = {"unbalanced": [1.0, 3.0], "quantile": [2.0, 6.0]}
    assert power(with_perplexities(values | {"switch": [math.nan, 2.0]})) == power(with_perplexities(values))
    assert "Fewer than two methods" in power(with_perplexities({"unbalanced": [1.0, 3.0]}))


def test_power_needs_shared_seeds():
    results = with_perplexities({"unbalanced": [5.0, 6.0], "quantile": [4.0, 5.0]})
    results["runs"][3]["seed"] = 7
    assert "share fewer than two seeds" in power(results)


def test_headline_of_one_seed_claims_nothing():
    assert headline(made_up_results(seeds=1)).endswith("which one seed cannot tell from chance.")


@pytest.mark.parametrize(
    ("quantile", "words"),
    [
        ([4.0, 5.01, 5.99], "quantile reaches the lowest perplexity, 5.000, 1.000 \u00b1 0.006 below unbalanced."),
        ([4.0, 5.5, 5.5], "quantile reaches the lowest perplexity, 5.000, within chance of unbalanced (6.000)."),
        ([7.0, 8.0, 9.0], "no method goes below the perplexity of unbalanced, 6.000."),
    ],
)
def test_headline_claims_what_the_seeds_show(quantile, words):
    sentence = headline(with_perplexities({"unbalanced": [5.0, 6.0, 7.0], "quantile": quantile}))
    assert sentence == f"quantile spreads the load most evenly (MaxVio 0.03, unbalanced 2.29); {words}"


def test_headline_without_a_finite_run():
    assert headline(with_perplexities({"unbalanced": [math.nan]})) == "No run finished with a finite perplexity."


def test_small_perplexities_show_three_decimals():
    assert perplexity_digits(summarise(with_perplexities({"unbalanced": [9.9], "switch": [12.0]}))) == 3
    assert perplexity_digits(summarise(with_perplexities({"unbalanced": [10.1], "switch": [12.0]}))) == 2
