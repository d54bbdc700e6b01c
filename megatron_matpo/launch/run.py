"""`matpo train` and `matpo sft`: check, open the run folder, plan, supervise."""

from __future__ import annotations

import sys
import time

from megatron_matpo.config.plan import make_plan, num_ports
from megatron_matpo.config.root import Config
from megatron_matpo.config.validate import Command, collect_warnings
from megatron_matpo.launch.console import Console, ProgressView
from megatron_matpo.launch.guard import run_guarded
from megatron_matpo.launch.ports import free_ports
from megatron_matpo.launch.preflight import check_recipe
from megatron_matpo.launch.roles import plan_roles
from megatron_matpo.launch.run_folder import open_run_folder
from megatron_matpo.launch.supervisor import Limits, Supervisor
from megatron_matpo.obs.progress import format_duration


def run(
    command: Command, recipe: str, overrides: list[str], *, accept_changes: bool = False
) -> int:
    """Run a recipe to its end and return the exit code (see `launch.supervisor`).

    Raises:
        ConfigError: nothing was started; one line for every violation.
        MatpoError: the run folder is in use, or a port is taken; nothing was started.
    """
    config = check_recipe(recipe, overrides, command)
    console = Console(sys.stdout)
    for warning in collect_warnings(config, command=command):
        console.line(f"warning: {warning}")
    folder, is_resumed = open_run_folder(config, command, accept_changes=accept_changes)
    ports = free_ports(config.cluster.host, num_ports(config), config.cluster.base_port)
    plan = make_plan(config, ports)
    folder.write_plan(plan)
    console.line(_headline(config, command, is_resumed))

    def supervise() -> int:
        started = time.monotonic()
        steps = config.run.steps if command == "train" else config.sft.steps
        roles = plan_roles(config, plan, folder.path, command)
        limits = Limits(config.run.start_timeout_s, config.run.stop_grace_s)
        view = ProgressView(folder.path, steps, console)
        code = Supervisor(folder.path, roles, limits, console, view).run()
        if code == 0:
            elapsed = format_duration(time.monotonic() - started)
            console.line(f"done in {elapsed}; results in {config.run_dir}")
        return code

    return run_guarded(supervise, config.run.stop_grace_s)


def _headline(config: Config, command: Command, is_resumed: bool) -> str:
    """What is being started, in one line."""
    parallel = config.parallel
    layout = [
        f"{name} {size}"
        for name, size in (
            ("tensor", parallel.tensor),
            ("pipeline", parallel.pipeline),
            ("context", parallel.context),
            ("data", parallel.data),
        )
        if size > 1
    ]
    ranks = f"{parallel.world_size} trainer rank{'s' * (parallel.world_size > 1)}"
    parts = [ranks + (f" ({', '.join(layout)})" if layout else "")]
    if command == "train" and config.rollout.replay:
        parts.append(f"episodes replayed from {config.rollout.replay}")
    elif command == "train":
        count = config.rollout.num_servers
        parts.append(f"{count} engine{'s' * (count > 1)} and the rollout manager")
    verb = "resuming" if is_resumed else "starting"
    return f"{verb} {config.run_dir} on {config.cluster.device}: {', '.join(parts)}"
