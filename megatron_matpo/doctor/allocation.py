"""Which node of how many this process is on, from the environment. Torch-free."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_matpo.errors import ConfigError

_OWN = ("MATPO_NODE_RANK", "MATPO_NUM_NODES")
_SLURM = ("SLURM_NODEID", "SLURM_STEP_NUM_NODES")


@dataclass(frozen=True)
class Node:
    """One node of a start, which has one task per node."""

    index: int
    count: int
    launch_id: str
    """The same on all nodes of one start, another one for every start; fit for a file's name."""
    name: str
    """What the scheduler calls the node."""


def this_node(environ: Mapping[str, str]) -> Node:
    """MATPO_NODE_RANK, MATPO_NUM_NODES and MATPO_LAUNCH_ID, else Slurm's variables of a step.

    Outside of a step (`salloc`, the batch script itself) there is one task, on one node, though
    Slurm names the job's nodes there too.

    Raises:
        ConfigError: the variables are no numbers, or contradict each other.
    """
    name = environ.get("SLURMD_NODENAME", socket.gethostname())
    if _OWN[1] in environ:
        names, launch_id = _OWN, environ.get("MATPO_LAUNCH_ID", "0")
    elif "SLURM_STEP_ID" in environ:
        names = _SLURM
        parts = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        launch_id = ".".join(environ.get(part, "0") for part in parts)
    else:
        return Node(0, 1, "local", name)
    index, count = (_number(environ, variable) for variable in names)
    if not 0 <= index < count:
        raise ConfigError(f"{names[0]}={index}: must be less than {names[1]}={count}")
    return Node(index, count, re.sub(r"[^A-Za-z0-9._-]", "_", launch_id), name)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdigit():
        raise ConfigError(f"{name}={text}: expected a number")
    return int(text)
