"""How the tests are shared out to two workers, and how a session ends."""

from __future__ import annotations

import os
import sys

import pytest

_STATUS = pytest.StashKey[int]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: a file is one worker's, and so are all files that use `live_run`.

    Servers and runs that are shared by tests are started once then.
    """
    users = {item.path for item in items if "live_run" in getattr(item, "fixturenames", ())}
    for item in items:
        group = "live_run" if item.path in users else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


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
