"""What the processes of a run know and nobody else.

Made anew for every start. On one node they live in the environment of the processes that need them;
several nodes pass them on in a file of mode 0600 that the leader removes (`launch.meeting`).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RunSecrets:
    """Never logged."""

    run_token: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)
    """Of the manager, for the trainer."""
    engine_key: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)
    """Of the engines, for manager and trainer."""
