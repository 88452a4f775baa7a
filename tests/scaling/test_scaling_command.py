import csv
import json
from pathlib import Path

import pytest
from scaling_grids import BUDGETS, CHINCHILLA, SYMMETRIC

from equipoise.cli import main
from equipoise.commands.scaling_law import CONFIG_FILE, REPORT_FILE, RESULTS_FILE
from equipoise.scaling import Surface, grid_of

QUICK = ["--bootstraps", "7", "--solver", "l-bfgs-b"]


def write_runs(path: Path, methods: dict[str, Surface]) -> str:
    """A grid of runs without noise, for each method."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "params", "tokens", "loss"])
        for method, surface in methods.items():
            grid = grid_of(surface, BUDGETS, points=5, width=8.0)
            writer.writerows((method, *row) for row in zip(grid.params, grid.tokens, grid.loss))
    return str(path)


def test_json_holds_the_law_of_each_method_the_best_model_of_each_budget_and_where_they_cross(tmp_path, capsys):
    """At a = 1/2 and equal coefficients, parameters and tokens are equal: sqrt(C / 6)."""
    runs = write_runs(tmp_path / "runs.csv", {"dense": SYMMETRIC, "moe": CHINCHILLA})
    assert main(["scaling-law", runs, *QUICK, "--flops", "6e20", "6e18", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["laws"]) == ["dense", "moe"]
    for name, value in CHINCHILLA._asdict().items():
        assert found["laws"]["moe"]["parameters"][name]["value"] == pytest.approx(value, rel=1e-6)
    optima = found["laws"]["dense"]["optima"]
    assert [optimum["flops"] for optimum in optima] == [6e18, 6e20]
    assert [optimum["params"]["value"] for optimum in optima] == pytest.approx([1e9, 1e10], rel=1e-5)
    assert len(found["crossings"]) == 1


def test_a_folder_gets_the_report_the_results_and_the_configuration(tmp_path, capsys):
    runs = write_runs(tmp_path / "runs.csv", {"": CHINCHILLA})
    folder = tmp_path / "out"
    assert main(["scaling-law", runs, *QUICK, "--out", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "25 runs" in shown
    assert f"Report: {folder / REPORT_FILE}" in shown
    law = json.loads((folder / RESULTS_FILE).read_text())["laws"][""]
    assert law["parameters"]["alpha"]["value"] == pytest.approx(0.34, rel=1e-6)
    assert law["optima"][0]["flops"] == pytest.approx(1e22)  # ten times the largest budget that was run
    assert "<title>" in (folder / REPORT_FILE).read_text()
    assert 'solver = "l-bfgs-b"' in (folder / CONFIG_FILE).read_text()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--flops", "0"], "Budgets given by --flops must be above 0."),
        (["--experts", "8"], "Experts can only be chosen by a law with terms for them"),
        (["--confidence", "1.5"], "confidence"),
        (["--extra", "total"], "total"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_nothing_is_written(tmp_path, capsys, flags, sentence):
    runs = write_runs(tmp_path / "runs.csv", {"": CHINCHILLA})
    assert main(["scaling-law", runs, *QUICK, *flags, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("equipoise: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_method_that_cannot_be_fitted_is_named(tmp_path, capsys):
    path = tmp_path / "runs.csv"
    write_runs(path, {"dense": SYMMETRIC})
    with path.open("a") as file:
        file.write("moe,1e9,1e10,2.5\n")
    assert main(["scaling-law", str(path), *QUICK]) == 2
    assert capsys.readouterr().err.startswith("equipoise: moe: ")
