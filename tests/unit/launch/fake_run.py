"""Supervises FakeRoles as `matpo train` supervises real ones.

`python fake_run.py RUN_DIR START_TIMEOUT_S GRACE_S 'NAME FLAG ...' ...`; roles whose flags include
`ready` count as ready at once; the role `trainer` ends the run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_matpo.launch.console import Console, ProgressView
from megatron_matpo.launch.guard import run_guarded
from megatron_matpo.launch.roles import RoleSpec
from megatron_matpo.launch.supervisor import Limits, Supervisor

FAKE_ROLE = Path(__file__).with_name("fake_role.py")


def main() -> int:
    run_dir = Path(sys.argv[1])
    limits = Limits(float(sys.argv[2]), float(sys.argv[3]))
    roles = []
    for text in sys.argv[4:]:
        name, *flags = text.split()
        is_ready = "ready" in flags
        roles.append(
            RoleSpec(
                name=name,
                argv=(sys.executable, str(FAKE_ROLE), name, *flags, f"run_dir={run_dir}"),
                env=dict(os.environ),
                is_ready=lambda is_ready=is_ready: is_ready,
                ends_run=name == "trainer",
            )
        )
    console = Console(sys.stdout)

    def supervise() -> int:
        print(f"supervisor pid {os.getpid()}", flush=True)
        return Supervisor(run_dir, roles, limits, console, ProgressView(run_dir, 3, console)).run()

    return run_guarded(supervise, limits.stop_grace_s)


if __name__ == "__main__":
    sys.exit(main())
