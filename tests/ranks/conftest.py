"""The session's pool of two ranks. Its tests form one xdist group, so that one worker, and one pool, has them all."""

from collections.abc import Iterator

import pytest

from laws.cases import parametrize
from ranks.pool import Ranks

pytest_generate_tests = parametrize


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks(2)
    yield pool
    pool.close()


@pytest.fixture
def make() -> str:
    """What builds the layer a law judges, by name: it is built in the ranks."""
    return "laws.cases:build"
