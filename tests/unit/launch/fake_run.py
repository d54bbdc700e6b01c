"""Supervises FakeRoles as `matpo train` supervises real ones.

`python fake_run.py RUN_DIR START_TIMEOUT_S GRACE_S 'NAME FLAG ...' ...`; roles whose flags include
`ready` count as ready at once; the role `trainer` ends the run. An engine with `restarts=N` is
started anew, `peers=N` of them are in the run. SAVE_TIMEOUT_S and SAVE_ON_STOP of
the environment are limits too; which node it is comes from the environment as for real runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_matpo.launch.console import Console, ProgressView
from megatron_matpo.launch.guard import run_guarded
from megatron_matpo.launch.meeting import Meeting
from megatron_matpo.launch.nodes import this_node
from megatron_matpo.launch.roles import RestartPolicy, RoleSpec
from megatron_matpo.launch.supervisor import Limits, Supervisor

FAKE_ROLE = Path(__file__).with_name("fake_role.py")


def main() -> int:
    run_dir = Path(sys.argv[1])
    environ = os.environ
    limits = Limits(
        start_timeout_s=float(sys.argv[2]),
        stop_grace_s=float(sys.argv[3]),
        save_timeout_s=float(environ.get("SAVE_TIMEOUT_S", "0")),
        save_on_stop="SAVE_ON_STOP" in environ,
    )
    node = this_node(environ)
    roles = []
    for text in sys.argv[4:]:
        name, *flags = text.split()
        is_ready = "ready" in flags
        settings = dict(flag.partition("=")[::2] for flag in flags)
        policy = RestartPolicy(
            int(settings.get("restarts", 0)), 0.3, 1.0, int(settings.get("peers", 1))
        )
        roles.append(
            RoleSpec(
                name=name,
                argv=(sys.executable, str(FAKE_ROLE), name, *flags, f"run_dir={run_dir}"),
                env=dict(os.environ),
                is_ready=lambda is_ready=is_ready: is_ready,
                ends_run=name == "trainer",
                may_end="may_end" in flags,
                is_needed_to_save=name.startswith("trainer"),
                restarts=policy if name.startswith("engine") else None,
            )
        )
    console = Console(sys.stdout)

    def supervise() -> int:
        print(f"supervisor pid {os.getpid()}", flush=True)
        meeting = Meeting(run_dir, node, node_timeout_s=6.0)
        view = ProgressView(run_dir, 3, console)
        return Supervisor(run_dir, roles, limits, console, view, meeting).run()

    return run_guarded(supervise, limits.stop_grace_s)


if __name__ == "__main__":
    sys.exit(main())
