"""Each law that a planted fault names accepts the sound layer and rejects the broken one."""

from importlib import import_module
from pathlib import Path

import pytest

from laws.cases import EXEMPTIONS, build
from laws.faults import FAULTS

HERE = {name: fault for name, fault in FAULTS.items() if callable(fault.make)}


@pytest.mark.parametrize("name", HERE)
def test_the_fault_is_rejected(name):
    fault = HERE[name]
    module, law = fault.law.split(".")
    check = getattr(import_module(module), law)
    assert (fault.arguments["method"], fault.law) not in EXEMPTIONS
    check(build, **fault.arguments)
    with pytest.raises(AssertionError):
        check(fault.make, **fault.arguments)


def test_the_page_of_laws_names_every_fault_and_every_exemption():
    page = (Path(__file__).parents[2] / "docs/laws.md").read_text(encoding="utf-8")
    for name, fault in FAULTS.items():
        assert f"| {name} | `{fault.law}` |" in page
    for (method, law), reason in EXEMPTIONS.items():
        assert f"| `{method}` | `{law}` | {reason} |" in page
