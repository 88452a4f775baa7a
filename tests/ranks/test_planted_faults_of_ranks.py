"""The planted faults that only show between processes, or in a compiled one, are rejected by the law they name."""

from importlib import import_module

import pytest

from laws.faults import FAULTS

pytestmark = pytest.mark.xdist_group("ranks")
OF_RANKS = {name: fault for name, fault in FAULTS.items() if isinstance(fault.make, str)}


@pytest.mark.parametrize("name", OF_RANKS)
def test_the_fault_is_rejected(ranks, make, name):
    fault = OF_RANKS[name]
    module, law = fault.law.split(".")
    check = getattr(import_module(module), law)
    check(ranks, make, **fault.arguments)
    with pytest.raises(AssertionError):
        check(ranks, fault.make, **fault.arguments)
