"""Plans and meetings of a run on one node, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_matpo.config.plan import Offer, Plan, bind, place
from megatron_matpo.config.root import Config
from megatron_matpo.launch.meeting import Meeting
from megatron_matpo.launch.nodes import Node

LONE = Node(0, 1, "local", "here")


def lone_plan(config: Config, ports: Iterable[int] = range(21000, 21100), **options: bool) -> Plan:
    """The plan of a run on this machine; `options` as those of `place`."""
    return bind(place(config, **options), [Offer("127.0.0.1", tuple(ports))])


def lone_meeting(run_dir: Path) -> Meeting:
    """Of a node that has nobody to meet."""
    return Meeting(run_dir, LONE, node_timeout_s=60.0)
