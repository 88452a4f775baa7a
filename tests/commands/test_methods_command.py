"""``equipoise methods``: all that is told of every method, in its place."""

import json
import re
from dataclasses import asdict

import pytest

from equipoise import METHODS, cli
from equipoise.building import defaults

LOSS_FREE_SETTINGS = {
    "top_k.renormalize": None,
    "top_k.capacity_factor": None,
    "top_k.drop": "score",
    "top_k.groups": 1,
    "top_k.kept_groups": 1,
    "top_k.scale": 1.0,
    "bias.rate": 0.001,
    "bias.rule": "sign",
    "bias.schedule": "constant",
    "bias.centre": False,
    "bias.alarm": 1.0,
}
CAUSAL = {"loss_free": "yes", "token_rounding": "in evaluation", "sinkhorn": "in evaluation", "expert_choice": "no"}


@pytest.fixture
def said(capsys, monkeypatch):
    """Runs the command in a window so wide that nothing is wrapped, and returns what it prints."""
    monkeypatch.setenv("COLUMNS", "1000")

    def said(*words: str) -> str:
        assert cli.main(["methods", *words]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return said


def cells(line: str) -> list[str]:
    """What stands between borders, or two blanks apart."""
    return [cell for cell in re.split(r"\s*[\u2502\u2503]\s*|\s{2,}", line.strip()) if cell]


def test_the_table_says_of_each_method_what_it_does_and_when_to_use_it(said):
    *lines, last = said().splitlines()
    assert last == "equipoise methods NAME explains one."
    assert cells(lines[1]) == ["method", "what it does", "use it when", "causal"]
    rows = [cells(line) for line in lines[3:-1]]
    assert [row[:3] for row in rows] == [[name, method.summary, method.use] for name, method in METHODS.items()]
    assert {row[0]: row[3] for row in rows if row[0] in CAUSAL} == CAUSAL


@pytest.mark.parametrize("name", METHODS)
def test_one_method_is_explained_by_all_that_is_known_of_it(said, name: str):
    method = METHODS[name]
    first, *lines = said(name).splitlines()
    assert first == f"{name}: {method.summary}"
    told = dict([*cells(line), ""][:2] for line in lines)
    assert told == {
        "source": method.source,
        "status": f"inferred in part: {method.inferred}" if method.inferred else "exact",
        "parts": ", ".join([method.scorer, method.selector, *method.balancers]),
        "moves": method.moves,
        "state": ", ".join(method.state) or "none",
        "traffic": method.traffic,
        "cost": method.cost,
        "causal": CAUSAL.get(name, told["causal"]),
        "use it when": method.use,
        "not when": method.avoid,
        "settings": ", ".join(f"{key}={value}" for key, value in defaults(method).items()),
    }


def test_a_narrow_window_breaks_no_name(said, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    shown = said()
    assert all(f" {name} " in shown for name in METHODS)


def test_machines_get_the_same_of_one_or_all(said):
    listed = json.loads(said("--json"))
    assert [each["name"] for each in listed] == list(METHODS)
    for each, method in zip(listed, METHODS.values()):
        plain = asdict(method) | {"settings": defaults(method), "state": list(method.state), "status": method.status}
        assert each == json.loads(json.dumps(plain)) | {"causal": each["causal"]}
    assert {each["name"]: each["causal"] for each in listed if each["name"] in CAUSAL} == CAUSAL
    assert json.loads(said("loss_free", "--json")) == [each for each in listed if each["name"] == "loss_free"]
    (loss_free,) = json.loads(said("--json", "loss_free"))
    assert loss_free["settings"] == LOSS_FREE_SETTINGS
    assert loss_free["status"] == "exact"
    assert loss_free["balancers"] == {"bias": {"rate": 0.001}}


@pytest.mark.parametrize("more", [[], ["--json"]])
@pytest.mark.parametrize(
    ("typed", "hint"),
    [("swich", " (did you mean 'switch'?)"), ("Loss-Free", " (did you mean 'loss_free'?)"), ("q3", "")],
)
def test_an_unknown_name_is_one_sentence_with_the_nearest_and_all(capsys, typed: str, hint: str, more: list[str]):
    assert cli.main(["methods", typed, *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"equipoise: Unknown method {typed!r}{hint}; there are {', '.join(METHODS)}.\n"


def test_two_names_are_one_too_many(capsys):
    assert cli.main(["methods", "switch", "loss_free"]) == 2
    assert capsys.readouterr().out == ""
