"""The table in the terminal and as Markdown."""

import io

import pytest
from made_up_results import made_up_results
from rich.console import Console

from equipoise.report.columns import columns
from equipoise.report.results import summarise
from equipoise.report.table import markdown, table


def shown(results: dict, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(results))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("seeds", [1, 3])
def test_nothing_is_cut_off(seeds, width):
    results = made_up_results(seeds)
    text = shown(results, width)
    assert "\u2026" not in text
    assert max(map(len, text.splitlines())) <= width
    for row in summarise(results):
        line = next(line for line in text.splitlines() if line.startswith(row.method))
        assert f" {row.perplexity:.3f}" in line
        assert f" {row.max_vio_global:.2f} " in line
        assert f" {row.tokens_per_second:,.0f} " in line


def test_one_seed_shows_no_spread_and_says_so_once():
    text = shown(made_up_results(1), 140)
    assert "\u00b1" not in text
    assert "Difference" not in text
    assert text.count("One seed shows no spread") == 1


def test_several_seeds_show_their_spread():
    results = made_up_results(3)
    row = summarise(results)[2]
    text = shown(results, 140)
    assert f"{row.perplexity:.3f} \u00b1{row.perplexity_sd:.3f}" in text
    assert f"{row.difference:+.3f} \u00b1{row.difference_se:.3f}" in text
    assert "difference to unbalanced" in " ".join(text.split())


def test_words_are_broken_only_where_it_is_narrow():
    assert "Specialisation" in shown(made_up_results(3), 140)
    assert "Special-" in shown(made_up_results(3), 80)


def test_what_is_not_causal_has_a_footnote():
    text = shown(made_up_results(1), 80)
    assert "expert_choice \u2020" in text
    assert "\u2020 Trained seeing later tokens, so its training loss is not comparable." in text
    causal = made_up_results(1)
    causal["runs"] = causal["runs"][:-1]
    assert "\u2020" not in shown(causal, 80)


def test_notes_of_runs_stand_below_once():
    assert shown(made_up_results(3), 140).count("expert_choice: evaluated with the top_k fall-back") == 1


def test_unclear_differences_are_dim():
    results = made_up_results(3)
    console = Console(width=140, force_terminal=True, color_system="truecolor", record=True, file=io.StringIO())
    console.print(table(results))
    lines = console.export_text(styles=True).splitlines()
    rows = {row.method: row for row in summarise(results)}
    assert rows["expert_choice"].difference_is_clear is False
    assert rows["quantile"].difference_is_clear is True
    assert "\x1b[2m" in next(line for line in lines if "expert_choice \u2020" in line)
    assert "\x1b[2m" not in next(line for line in lines if "quantile" in line)


def test_markup_in_a_name_stays_text():
    results = made_up_results(1)
    results["runs"][1]["method"] = "[red]x[/red]"
    assert "[red]x[/red]" in shown(results, 140)


def test_memory_has_one_unit():
    results = made_up_results(1)
    assert columns(results, summarise(results))[-1].title == "Peak memory, MB"
    results["runs"][0]["peak_memory_bytes"] = 1_230_000_000
    rows = summarise(results)
    column = columns(results, rows)[-1]
    assert (column.title, column.text(rows[0]), column.heading) == ("Peak memory, GB", "1.23", "Peak\nGB")


def test_markdown():
    results = made_up_results(1)
    results["runs"] = results["runs"][1:3]
    for run, perplexity in zip(results["runs"], (12.345, 11.0)):
        run |= {"perplexity": perplexity, "max_vio_global": 0.25, "max_vio_batch": 0.5, "dead_experts": 2}
        run |= {"load_entropy": 0.9, "specialisation": 0.1, "tokens_per_second": 1234.0, "peak_memory_bytes": 7e6}
    assert markdown(results) == (
        "| Method | Perplexity | MaxVio global | MaxVio batch | Dead experts of 64 | Load entropy | Specialisation "
        "| Tokens/s | Peak memory, MB |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| switch | 12.35 | 0.25 | 0.50 | 2 | 0.900 | 0.100 | 1,234 | 7 |\n"
        "| global\\_batch | 11.00 | 0.25 | 0.50 | 2 | 0.900 | 0.100 | 1,234 | 7 |\n"
        "\n"
        "One seed shows no spread: no difference in perplexity can be claimed from this comparison; run it with "
        "--seeds 3.\n"
    )


def test_markdown_escapes_what_would_break_a_row():
    results = made_up_results(1)
    results["runs"][0]["method"] = "a|b"
    assert "| a\\|b | " in markdown(results)
