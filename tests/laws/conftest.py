"""A law takes ``method``, and ``make``, which builds the layer it judges; planted faults pass another ``make``."""

import pytest

from laws.cases import Make, build, parametrize

pytest_generate_tests = parametrize


@pytest.fixture
def make() -> Make:
    return build
