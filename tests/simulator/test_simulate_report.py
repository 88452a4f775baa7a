"""The page: its pictures add up to the simulation, and every view has its choice."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from tiny_machine import SHAPE, tiny

from equipoise.simulator import Settings, Software, simulate
from equipoise.simulator.pictures import WAITING, plots
from equipoise.simulator.report import page
from equipoise.simulator.results import block_names, blocks, facts, headline

EVIL = "</script><b>planner"


@pytest.fixture(scope="module")
def found():
    shape = replace(SHAPE, num_experts=70, num_layers=2, other_params=50.0)
    simulation = simulate("zipf:1.2", tiny(70, Software()), "native,least-loaded", Settings(shape=shape, tokens=70))
    return facts(simulation)


def test_a_ranks_bars_fill_the_layer(found):
    picture = plots(found)["timeline"]
    for place, policy in enumerate(found["policies"].values()):
        filled, ends = dict.fromkeys(policy["ranks"], 0.0), dict.fromkeys(policy["ranks"], 0.0)
        for trace in picture["views"][str(place)]["traces"]:
            for rank, length, base in zip(trace["y"], trace["x"], trace["base"]):
                filled[rank] += length
                ends[rank] = max(ends[rank], base + length)
        layer = 1e3 * sum(phase["until"] for phase in policy["timeline"])
        np.testing.assert_allclose(list(ends.values()), layer, rtol=1e-3)
        np.testing.assert_allclose(list(filled.values()), layer, rtol=1e-3)


def test_phases_stack_up_to_the_step(found):
    traces = plots(found)["phases"]["views"][""]["traces"]
    steps = np.sum([trace["x"] for trace in traces], axis=0)
    np.testing.assert_allclose(steps, [1e3 * policy["seconds"] for policy in found["policies"].values()], rtol=1e-3)


def test_who_waits_for_whom_in_blocks(found):
    policy = found["policies"]["native"]
    assert len(policy["ranks"]) == len(policy["waits_for"]) == len(policy["waits_for"][0]) == 64
    assert policy["ranks"][10] == "10-11"
    trace = plots(found)["waits"]["views"]["0"]["traces"][0]
    waits = np.array(policy["waits_for"])
    np.testing.assert_allclose(np.array(trace["z"]) - 1, waits / waits.mean(), atol=0.01)
    assert np.array(trace["z"]).min() >= trace["zmin"]


def test_blocks_are_means():
    assert block_names(3) == ["0", "1", "2"]
    np.testing.assert_allclose(blocks(np.arange(3.0)), np.arange(3.0))
    assert blocks(np.ones(129)).tolist() == [1.0] * 64
    assert blocks(np.arange(128.0))[:2].tolist() == [0.5, 2.5]


def test_the_page_is_labelled_and_every_choice_has_its_view(found):
    text = page(found)
    assert text.count("simulated") > 5
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1].replace("\\u003c", "<"))
    for name, plot in data["plots"].items():
        assert f'id="{name}"' in text
        keys = set(re.findall(r'<option value="(\d)"', text)) if name in ("timeline", "waits") else {""}
        assert set(plot["views"]) == keys
    assert {trace["meta"]["method"] for trace in data["plots"]["timeline"]["views"]["0"]["traces"]} >= {WAITING}


def test_names_cannot_break_out(found):
    renamed = found | {"source": EVIL, "policies": {EVIL: found["policies"]["native"]}}
    text = page(renamed | {"calibration": {"constants": {"row_passes": 1.0}, "points": []}})
    assert EVIL not in text
    assert "Fitted: row_passes 1." in text


def test_what_does_not_fit_is_noted(found):
    policy = found["policies"]["native"] | {"fits": False, "foresight": True, "dropped_rows": 7.0}
    text = page(found | {"policies": {"native": policy}})
    for words in ("do not fit into a rank", "it saw the very loads", "7 rows of a step were dropped"):
        assert words in text
    assert headline(found | {"policies": {"native": policy}}).startswith("None of the policies is faster than native")
