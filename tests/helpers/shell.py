"""Where shellcheck is: `make setup` puts it beside the tests' Python, Debian on PATH."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def shellcheck() -> str | None:
    """The program, or None."""
    own = Path(sys.executable).with_name("shellcheck")
    return str(own) if own.is_file() else shutil.which("shellcheck")
