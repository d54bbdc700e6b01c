"""`matpo train` and `matpo sft`: check, open the run folder, plan, supervise."""

from __future__ import annotations

import sys
import time

from megatron_matpo.config.root import Config
from megatron_matpo.config.validate import Command, collect_warnings
from megatron_matpo.launch.console import Console, ProgressView
from megatron_matpo.launch.meeting import Meeting
from megatron_matpo.launch.run_folder import open_run_folder
from megatron_matpo.launch.start import NoView, Start, check_on_node, follow, lead, supervise
from megatron_matpo.obs.progress import format_duration


def run(
    command: Command, recipe: str, overrides: list[str], *, accept_changes: bool = False
) -> int:
    """Run this node's part of a recipe to the end; returns the exit code (`launch.supervisor`).

    Raises:
        ConfigError: nothing was started; one line for every violation.
        MatpoError: the run folder is in use, a port is taken, or another node gave up; nothing was
            started.
    """
    config, meeting = check_on_node(recipe, overrides, command)
    with meeting.explaining():
        if not meeting.node.is_leader:
            start = follow(config, meeting, has_trainer=True)
            assert start is not None, "there is always something to train"
            console = Console(sys.stdout, prefix=f"{meeting.name_of(meeting.node.index)}: ")
            return supervise(start, command, console, NoView(), lambda code: None)
        console = Console(sys.stdout)
        start = _begin(config, meeting, command, console, accept_changes=accept_changes)
    began = time.monotonic()
    steps = config.run.steps if command == "train" else config.sft.steps

    def after(code: int) -> None:
        if code == 0:
            elapsed = format_duration(time.monotonic() - began)
            console.line(f"done in {elapsed}; results in {config.run_dir}")

    view = ProgressView(start.run_dir, steps, console)
    return supervise(start, command, console, view, after)


def _begin(
    config: Config, meeting: Meeting, command: Command, console: Console, *, accept_changes: bool
) -> Start:
    """The leader's part before any role starts."""
    for warning in collect_warnings(config, command=command):
        console.line(f"warning: {warning}")
    folder, is_resumed = open_run_folder(config, command, accept_changes=accept_changes)
    start = lead(config, folder, meeting, has_trainer=True)
    console.line(_headline(config, command, is_resumed))
    return start


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
    nodes = f" on {config.cluster.num_nodes} nodes" if config.cluster.num_nodes > 1 else ""
    return f"{verb} {config.run_dir} on {config.cluster.device}{nodes}: {', '.join(parts)}"
