"""How the whole test session ends."""

from __future__ import annotations

import os
import sys

import pytest

_STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave as the trainer does (`trainer/process.py`), without Python's shutdown.

    Tests of hanging peers leave threads inside gloo; when one of them comes back while the
    interpreter is being torn down, it ends the process with SIGABRT, whatever the tests said.
    """
    if _STATUS in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[_STATUS])
