"""The shell of every report: one self-contained HTML document, with its looks, its pictures and what draws them."""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import Any

from equipoise.errors import UserError

# Nothing may be loaded from anywhere: the page works offline, and says so to the browser.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
STYLES = ("theme.css", "page.css", "pictures.css")


def document(title: str, body: str, pictures: dict[str, Any]) -> str:
    """A page that needs no network.

    Args:
        title: of the window; any text.
        body: HTML of the page's sections.
        pictures: ``looks`` by name and ``plots`` by the id of their place, for ``page.js``.
    Fails: UserError without plotly.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>{"".join(map(_data_file, STYLES))}</style>
</head>
<body>
<main>
{body}
<noscript><p>The pictures need JavaScript; the tables do not.</p></noscript>
</main>
<script type="application/json" id="data">{_json(pictures)}</script>
<script>{plotly_script()}</script>
<script>{_data_file("page.js")}</script>
</body>
</html>
"""


def plotly_script() -> str:
    """The library that draws the plots. Fails: UserError where it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError("The report needs plotly: pip install 'equipoise[report]'.") from error
    return get_plotlyjs()


def _json(value: Any) -> str:
    """JSON that no string in it can break out of: inside a script element only `<` could."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _data_file(name: str) -> str:
    return resources.files("equipoise.report").joinpath(name).read_text(encoding="utf-8")
