"""The page as a file."""

import html
import json
import re
import sys
from html.parser import HTMLParser
from importlib import resources

import pytest
from made_up_results import made_up_results

from equipoise.errors import UserError
from equipoise.report.page import write_page

HOSTILE = "</script><script>alert('x')</script>&amp;<b>"


class Elements(HTMLParser):
    """Every element with its attributes, and the text of scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(made_up_results(3), path)
    return path.read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_it_stays_under_its_size_even_when_large(tmp_path):
    results = made_up_results(1, layers=24, experts=64, domains={f"domain {n}": 1 / 12 for n in range(12)})
    results["runs"] = [run | {"method": f"{run['method']}_{n}"} for n in range(4) for run in results["runs"]]
    write_page(results, tmp_path / "large.html")
    assert 4_500_000 < (tmp_path / "large.html").stat().st_size <= 6_000_000


def test_nothing_is_loaded_from_elsewhere(page):
    elements = Elements(page).elements
    assert [attributes for _, attributes in elements if {"src", "href", "action", "data"} & set(attributes)] == []
    policy = next(attributes for tag, attributes in elements if attributes.get("http-equiv"))
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert "default-src 'none'" in policy["content"]
    for name in ("theme.css", "page.css", "pictures.css", "page.js"):
        text = resources.files("equipoise.report").joinpath(name).read_text(encoding="utf-8")
        assert not re.search(r"https?:|url\(|@import", text), name
        assert text in page


def test_the_window_is_named_for_the_methods(page):
    names = "unbalanced, switch, global_batch, loss_free, quantile, expert_choice"
    assert f"<title>Equipoise: {names}</title>" in page


def test_every_picture_has_its_place(page):
    divs = {attributes["id"] for _, attributes in Elements(page).elements if attributes.get("class") == "plot"}
    assert divs == set(data_of(page)["plots"]) == {"loss", "max-vio", "domain", *(f"load-{n}" for n in range(6))}


def test_the_tables_hold_the_numbers(page):
    body = html.unescape(page[page.index("<body>") : page.index('<script type="application/json"')])
    results = made_up_results(3)
    assert results["power"] in body
    for run in results["runs"]:
        assert f"<td>{run['loss']:.4f}</td><td>{run['perplexity']:.3f}</td>" in body
    assert "<code>bias.rate = 0.001</code>" in body
    assert "top_k = 2" in body
    assert "pip install 'equipoise[report]==0.1.0'" in body
    assert "<dt>torch</dt><dd>2.13.0+cpu</dd>" in body
    assert "commit" not in body  # null: unknown


def test_hostile_names_stay_text(tmp_path):
    results = made_up_results(1, domains={HOSTILE: 0.5, "plain": 0.5})
    results["data"]["source"] = HOSTILE
    results["settings"]["data"]["source"] = HOSTILE
    results["environment"]["cpu"] = HOSTILE
    run = results["runs"][0]
    run["notes"], run["kernel"], run["settings"] = [HOSTILE], HOSTILE, {HOSTILE: HOSTILE}
    run["per_layer"][0]["name"] = HOSTILE
    run["method"] = results["baseline"] = HOSTILE
    write_page(results, tmp_path / "hostile.html")
    write_page(made_up_results(1), tmp_path / "plain.html")
    hostile, plain = (
        [tag for tag, _ in Elements((tmp_path / name).read_text(encoding="utf-8")).elements]
        for name in ("hostile.html", "plain.html")
    )
    for tag in ("script", "b", "svg", "figure"):
        assert hostile.count(tag) == plain.count(tag), tag
    data = data_of((tmp_path / "hostile.html").read_text(encoding="utf-8"))
    assert data["plots"]["domain"]["trace"]["meta"]["rows"] == [html.escape(HOSTILE), "plain"]
    assert data["looks"][HOSTILE]["label"] == HOSTILE


def test_a_diverged_run_is_written_as_gaps(tmp_path):
    results = made_up_results(1)
    run = results["runs"][1]
    run["loss"], run["perplexity"] = float("nan"), float("inf")
    for point in run["curve"]:
        point["loss"] = point["max_vio"] = float("nan")
    write_page(results, tmp_path / "diverged.html")
    page = (tmp_path / "diverged.html").read_text(encoding="utf-8")
    trace = next(
        trace
        for trace in data_of(page)["plots"]["loss"]["views"]["training"]["traces"]
        if trace["meta"]["method"] == "switch"
    )
    assert set(trace["y"]) == {None}
    assert "<td>inf</td>" in page


def test_without_plotly_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UserError, match=r"pip install 'equipoise\[report\]'"):
        write_page(made_up_results(1), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_from_the_page(theme):
    text = resources.files("equipoise.report").joinpath("theme.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", text.split("@media")[theme]))
    assert all(contrast(colours[name], colours["page"]) >= 4.5 for name in ("ink", "muted", "accent"))
    marks = ["baseline", *(f"method-{number}" for number in range(1, 7))]
    assert {name: contrast(colours[name], colours["page"]) >= 2.9 for name in marks} == dict.fromkeys(marks, True)
