"""The report in a real browser, in both themes, on a desktop and on a phone."""

import runpy
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from equipoise.report.page import write_page

CHROMIUM = shutil.which("chromium")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
DOMAIN = "</script><script>document.title = 'broken out'</script>"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on the PATH: the report is not tried in a browser"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    made_up = runpy.run_path(str(Path(__file__).parents[1] / "report" / "made_up_results.py"))["made_up_results"]
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_page(made_up(2, domains={DOMAIN: 0.4, "a folder with quite a long name": 0.3, "prose": 0.3}), path)
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, report):
    """Opens the report; at the end there was no error and no request but for the file itself."""
    contexts, requests, complaints = [], [], []

    def open_page(size: dict = DESKTOP, scheme: str = "light"):
        context = browser.new_context(viewport=size, color_scheme=scheme, has_touch=size is PHONE)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(report)
        page.locator("#domain .heatmaplayer image").wait_for()  # the last to be drawn
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert requests == [report] * len(contexts)


def pixels(page, plot: str) -> str:
    """The picture that a heat map shows."""
    return page.locator(f"#{plot} .heatmaplayer image").get_attribute("href")


def lines(page, plot: str):
    """The lines and bands of a picture."""
    return page.locator(f"#{plot} .scatterlayer path.js-line")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_plot_is_drawn_and_nothing_overflows(visit, size, scheme):
    page = visit(size, scheme)
    for plot in ("loss", "max-vio"):
        assert lines(page, plot).count() == 12  # six methods, each with a line and a band
        assert lines(page, plot).last.bounding_box()["width"] > size["width"] / 2
    for plot in ("domain", *(f"load-{position}" for position in range(6))):
        assert page.locator(f"#{plot} .heatmaplayer image").bounding_box()["width"] > 200
    assert page.title().startswith("Equipoise: unbalanced")  # the hostile domain did not change it
    assert page.locator("#domain .ytick text").first.text_content() == "</script><scrip\u2026"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]


def test_wide_tables_scroll_inside_their_box(visit):
    page = visit(PHONE)
    box = page.locator("#results .scroll")
    name = page.locator("#results tbody th").first
    before = name.bounding_box()["x"]
    assert box.evaluate("box => { box.scrollTo(400, 0); return box.scrollLeft }") > 100
    assert name.bounding_box()["x"] == before  # the methods' names stay in sight


def test_controls_change_the_pictures(visit):
    page = visit()
    method, layer = page.locator("select").all()
    shown = [pixels(page, "domain")]
    method.select_option(label="loss_free")
    shown.append(pixels(page, "domain"))
    layer.select_option(label="layers.3.moe")
    shown.append(pixels(page, "domain"))
    assert len(set(shown)) == 3
    assert page.evaluate("document.getElementById('domain').data[0].z") == page.evaluate(
        "JSON.parse(document.getElementById('data').textContent).plots.domain.views['3/3'].traces[0].z"
    )

    titles = []
    for tab in ("Validation", "Difference", "Training"):
        page.get_by_text(tab, exact=True).click()
        titles.append(page.locator("#loss .ytitle").text_content())
    assert titles == ["Loss, nats per token", "Loss minus that of unbalanced", "Loss, nats per token"]
    assert page.evaluate("document.getElementById('loss').data.at(-1).x.length") == 100

    buttons = page.get_by_role("button", name="quantile").all()
    buttons[0].click()
    assert [button.get_attribute("aria-pressed") for button in buttons] == ["false", "false"]
    assert [lines(page, plot).count() for plot in ("loss", "max-vio")] == [10, 10]
    buttons[1].click()
    assert [lines(page, plot).count() for plot in ("loss", "max-vio")] == [12, 12]


def test_a_method_has_one_colour_which_follows_the_theme(visit):
    page = visit(scheme="light")

    def colours() -> set[str]:
        """The colours of global_batch, the third method, wherever it appears."""
        swatch = page.locator("#results tbody i").nth(2)
        legend = page.get_by_role("button", name="global_batch").first.locator("path")
        return {
            swatch.evaluate("swatch => getComputedStyle(swatch).backgroundColor"),
            legend.evaluate("path => getComputedStyle(path).stroke"),
            *(lines(page, plot).nth(8).evaluate("line => line.style.stroke") for plot in ("loss", "max-vio")),
        }

    light = pixels(page, "load-0")
    assert colours() == {"rgb(222, 122, 48)"}
    page.emulate_media(color_scheme="dark")
    expect(page.locator("#domain .xtick text").first).to_have_css("fill", "rgb(160, 168, 179)")
    assert colours() == {"rgb(224, 112, 47)"}
    assert pixels(page, "load-0") != light
