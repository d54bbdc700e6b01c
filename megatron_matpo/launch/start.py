"""From a checked configuration to supervised roles, on the leader and on the other nodes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_matpo.config.load import format_problems, load_resolved
from megatron_matpo.config.plan import Offer, Plan, bind, place
from megatron_matpo.config.root import Config
from megatron_matpo.config.validate import Command
from megatron_matpo.errors import ConfigError
from megatron_matpo.launch.console import Console, View
from megatron_matpo.launch.guard import run_guarded
from megatron_matpo.launch.meeting import Meeting
from megatron_matpo.launch.nodes import Node, address_of, check_nodes, this_node
from megatron_matpo.launch.preflight import collect_problems
from megatron_matpo.launch.roles import plan_roles
from megatron_matpo.launch.run_folder import CONFIG_FILE, PLAN_FILE, RunFolder
from megatron_matpo.launch.run_secrets import RunSecrets
from megatron_matpo.launch.supervisor import Limits, Supervisor
from megatron_matpo.ports import free_ports


@dataclass(frozen=True)
class Start:
    """What a node knows when its roles may start."""

    config: Config
    plan: Plan
    run_dir: Path
    secrets: RunSecrets
    meeting: Meeting


class NoView:
    """Nodes that do not lead show their roles only."""

    def update(self) -> None:
        """Nothing to show."""


def check_on_node(recipe: str, overrides: list[str], command: Command) -> tuple[Config, Meeting]:
    """Check the recipe on this node, and tell the other nodes what is wrong here.

    Raises:
        ConfigError: one line for every violation; nothing was started.
    """
    node = this_node(os.environ)
    config, problems = collect_problems(recipe, overrides, command)
    meeting = _open_meeting(config, node)
    with meeting.explaining():
        if problems:
            raise ConfigError(format_problems(problems))
        check_nodes(node, config.cluster)
    return config, meeting


def _open_meeting(config: Config, node: Node) -> Meeting:
    run_dir = Path(config.run_dir).resolve()
    try:
        return Meeting(run_dir, node, node_timeout_s=config.cluster.node_timeout_s)
    except OSError as error:
        raise ConfigError(
            f"run.dir={config.run.dir}: the run's folder cannot be made or written ({error})"
        ) from error


def lead(config: Config, folder: RunFolder, meeting: Meeting, *, has_trainer: bool) -> Start:
    """Leader: meet all nodes and write the plan.

    Raises:
        MatpoError: a port is taken.
        DeadlineError: a node did not come inside `run.start_timeout_s`.
    """
    meeting.forget_earlier()
    placement = place(config, has_trainer=has_trainer)
    offers = meeting.gather(
        _own_offer(config, placement.num_ports(meeting.node.index)), config.run.start_timeout_s
    )
    plan = bind(placement, offers)
    folder.write_plan(plan)
    secrets = RunSecrets()
    meeting.begin(secrets)
    return Start(config, plan, folder.path, secrets, meeting)


def follow(config: Config, meeting: Meeting, *, has_trainer: bool) -> Start | None:
    """Not the leader: offer what this node has, and wait for the plan.

    Returns:
        None if there was nothing to do and the run is over.

    Raises:
        MatpoError: a port is taken, or the leader gave up.
        DeadlineError: no plan inside `run.start_timeout_s`.
    """
    placement = place(config, has_trainer=has_trainer)
    meeting.offer(_own_offer(config, placement.num_ports(meeting.node.index)))
    secrets = meeting.wait_for_start(config.run.start_timeout_s)
    if secrets is None:
        return None
    run_dir = Path(config.run_dir).resolve()
    # The leader's word: what it wrote is what all roles read.
    config = load_resolved(str(run_dir / CONFIG_FILE))
    plan = Plan.from_json((run_dir / PLAN_FILE).read_text())
    return Start(config, plan, run_dir, secrets, meeting)


def supervise(
    start: Start, command: Command, console: Console, view: View, after: Callable[[int], None]
) -> int:
    """Run this node's roles to the end; returns the exit code of the whole.

    Args:
        start: of this node.
        command: what the run is for.
        console: gets the supervisor's lines.
        view: what is shown while the run is on.
        after: called with the exit code in the supervisor's process.
    """
    run = start.config.run

    def work() -> int:
        roles = plan_roles(
            start.config,
            start.plan,
            start.run_dir,
            command,
            start.secrets,
            start.meeting.node.index,
        )
        limits = Limits(
            start_timeout_s=run.start_timeout_s,
            stop_grace_s=run.stop_grace_s,
            # An evaluation has every finished episode on disk already.
            save_timeout_s=0.0 if command == "eval" else run.save_timeout_s,
            save_on_stop=run.save_on_stop,
        )
        supervisor = Supervisor(start.run_dir, roles, limits, console, view, start.meeting)
        code = supervisor.run()
        after(code)
        return code

    return run_guarded(work, run.stop_grace_s)


def _own_offer(config: Config, num_ports: int) -> Offer:
    host = address_of(config.cluster)
    return Offer(host, tuple(free_ports(host, num_ports, config.cluster.base_port)))
