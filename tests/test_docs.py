"""The pages: what they show runs, what they link to exists, and what they say of the methods is what the code does."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from equipoise import METHODS, MoE, SoftMoE
from equipoise.balancing import BALANCERS
from equipoise.building import build
from equipoise.routing import SCORERS, SELECTORS
from laws.faults import FAULTS

ROOT = Path(__file__).parents[1]
METHOD_PAGES = ROOT / "docs/methods"
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
PARTS = SCORERS | SELECTORS | BALANCERS
SETTING = re.compile(rf"\b({'|'.join(PARTS)})\.(?!md\b|py\b)(\w+)")


def blocks():
    """Every Python block of every page, by page and line."""
    for name, path in PAGES.items():
        text = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match[2] == "python":
                line = text[: match.start()].count("\n") + 1
                yield pytest.param(name, line, textwrap.dedent(match[3]), id=f"{name}:{line}")


def settings_of(name):
    """A method's settings as the code resolves them."""
    return build(METHODS[name], 5, {})[3]


def table(path):
    """The only table of a page as its rows of cells, without the head."""
    rows = re.findall(r"^\|(.*)\|$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows[2:]]


def settings_in(path):
    """The settings that a page's table names, and their defaults."""
    return {row[0].strip("`"): ast.literal_eval(row[1].strip("`")) for row in table(path)}


@pytest.mark.parametrize("name", PAGES)
def test_every_fence_is_closed_and_every_python_block_is_found(name):
    text = PAGES[name].read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    assert text.count("```") == 2 * len(found)
    assert text.count("```python") == sum(match[2] == "python" for match in found)


@pytest.mark.parametrize(("name", "line", "code"), list(blocks()))
def test_every_python_block_runs(name, line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    padded = "\n" * line + code  # an error names the page's own line
    if "from ray " in code:
        pytest.importorskip("ray.serve", reason="needs Ray: pip install 'equipoise[serve]'")
        subprocess.run([sys.executable, "-c", padded], check=True)  # Ray copies classes, which checked types prevent
    else:
        exec(compile(padded, PAGES[name], "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("name", PAGES)
def test_every_relative_link_leads_to_a_file(name):
    prose = FENCE.sub("", PAGES[name].read_text(encoding="utf-8"))
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]
    missing = [link for link in links if link and not (PAGES[name].parent / link).exists()]
    assert not missing


def test_every_method_has_its_page_and_every_page_its_method():
    pages = {path.stem for path in METHOD_PAGES.glob("*.md")}
    assert pages == METHODS.keys() | {"README", "proofs", "z_loss", "soft_moe"}


@pytest.mark.parametrize("name", METHODS)
def test_a_page_lists_the_settings_of_its_method_and_their_defaults(name):
    assert settings_in(METHOD_PAGES / f"{name}.md") == settings_of(name)


def test_the_page_of_the_z_loss_lists_its_argument_and_its_default():
    default = inspect.signature(MoE).parameters["z_loss"].default
    assert settings_in(METHOD_PAGES / "z_loss.md") == {"z_loss": default}


def test_the_page_of_soft_moe_lists_its_arguments_and_their_defaults():
    arguments = inspect.signature(SoftMoE).parameters.values()
    defaults = {each.name: each.default for each in arguments if each.default is not inspect.Parameter.empty}
    assert settings_in(METHOD_PAGES / "soft_moe.md") == defaults


@pytest.mark.parametrize("name", PAGES)
def test_every_setting_that_is_named_exists(name):
    known = {key for method in METHODS for key in settings_of(method)}
    named = {f"{part}.{setting}" for part, setting in SETTING.findall(PAGES[name].read_text(encoding="utf-8"))}
    assert named <= known


@pytest.mark.parametrize("name", METHODS)
def test_a_page_names_its_source_and_what_is_inferred(name):
    text = (METHOD_PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\d{4}\.\d{5}", METHODS[name].source)) <= set(re.findall(r"\d{4}\.\d{5}", text))
    assert "INFERRED" in text or not METHODS[name].inferred


def overview():
    """The rows of the table that helps to choose, as the code has them."""
    for name, method in METHODS.items():
        causal = "no" if not method.causal else "in evaluation" if method.looks_ahead else "yes"
        state = ", ".join(f"`{part}`" for part in method.state) or "none"
        cells = [f"[`{name}`]({name}.md)", method.moves, state, method.traffic, causal, method.use, method.avoid]
        yield f"| {' | '.join(cells)} |"


def test_the_overview_says_what_the_code_says():
    expected = "\n".join(overview())
    assert expected in (METHOD_PAGES / "README.md").read_text(encoding="utf-8"), f"write:\n{expected}"


def test_the_readme_names_every_method():
    expected = "\n".join(f"| `{name}` | {method.summary} | {method.source} |" for name, method in METHODS.items())
    assert expected in (ROOT / "README.md").read_text(encoding="utf-8"), f"write:\n{expected}"


def test_every_method_has_its_proof():
    rows = {row[0].strip("`"): row for row in table(METHOD_PAGES / "proofs.md")}
    assert list(rows) == list(METHODS)
    for name, (_, oracle, planted) in rows.items():
        fault, _, law = planted.partition(": ")
        assert len(oracle) > 20
        assert (FAULTS[fault].arguments["method"], FAULTS[fault].law) == (name, law.strip("`"))
