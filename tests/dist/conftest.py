"""One pool of rank processes for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.helpers.dist import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool
