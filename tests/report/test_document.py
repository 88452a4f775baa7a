"""The shell of all reports: what stands where, once, and that no text can break out of its place."""

import json
from html.parser import HTMLParser
from importlib import resources

import pytest

from equipoise.report.document import document, plotly_script

HOSTILE = "</title></script><script>alert('x')</script> & \"q\" <!-- &lt;"
PICTURES = {"looks": {HOSTILE: 0.5}, "plots": {"loss": [1, None, HOSTILE]}}
BODY = "<p>A &amp; <b>B</b></p>"


class Page(HTMLParser):
    """The elements in their order, their attributes, and the text that each holds before another begins or it ends."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[dict] = []
        self.texts: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append(dict(attrs))
        self.texts.append("")
        self.inside = True

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data

    def held(self, tag: str) -> list[str]:
        return [text for each, text in zip(self.tags, self.texts) if each == tag]


@pytest.fixture(scope="module")
def text() -> str:
    return document(HOSTILE, BODY, PICTURES)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def source(name: str) -> str:
    return resources.files("equipoise.report").joinpath(name).read_text(encoding="utf-8")


def test_any_title_stays_the_text_of_the_title(page: Page):
    assert page.held("title") == [HOSTILE]


def test_the_data_the_library_and_what_draws_stand_once_in_this_order(text: str, page: Page):
    data, library, drawing = page.held("script")
    assert json.loads(data) == PICTURES
    assert "<" not in data
    assert library == plotly_script()
    assert drawing == source("page.js")
    assert text.count(plotly_script()) == 1


def test_the_body_is_taken_as_it_is_between_the_looks_and_the_data(text: str, page: Page):
    assert page.tags == [
        *("html", "head", "meta", "meta", "meta", "meta", "title", "style"),
        *("body", "main", "p", "b", "noscript", "p", "script", "script", "script"),
    ]
    assert text.count(f"<main>\n{BODY}\n<noscript>") == 1
    assert page.held("style") == ["".join(map(source, ("theme.css", "page.css", "pictures.css")))]
    assert page.held("p") == ["A & ", "The pictures need JavaScript; the tables do not."]


def test_the_head_tells_browsers_of_its_letters_themes_and_that_nothing_is_loaded(text: str, page: Page):
    assert text.startswith("<!doctype html>\n")
    assert page.attributes[0] == {"lang": "en"}
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
    assert page.attributes[2:6] == [
        {"charset": "utf-8"},
        {"http-equiv": "Content-Security-Policy", "content": policy},
        {"name": "viewport", "content": "width=device-width, initial-scale=1"},
        {"name": "color-scheme", "content": "light dark"},
    ]


def test_numbers_that_browsers_cannot_read_are_our_error():
    with pytest.raises(ValueError, match="not JSON compliant"):
        document("", "", {"plots": [float("nan")]})
