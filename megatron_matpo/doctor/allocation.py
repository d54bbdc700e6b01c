"""Which node of how many this process is on, from the environment. Torch-free."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_matpo.errors import ConfigError


@dataclass(frozen=True)
class Allocation:
    """One task per node."""

    rank: int = 0
    num_nodes: int = 1
    launch_id: str = "alone"
    """The same on all nodes of one start, another one for every start; fit for a file's name."""

    @property
    def label(self) -> str:
        """`3 (host)`; empty on a single node."""
        return f"{self.rank} ({socket.gethostname()})" if self.num_nodes > 1 else ""


def read_allocation(env: Mapping[str, str]) -> Allocation:
    """MATPO_NODE_RANK, MATPO_NUM_NODES and MATPO_LAUNCH_ID, else Slurm's variables of a step.

    Outside of a step (`salloc`, the batch script itself) there is one task, on one node, though
    Slurm names the job's nodes there too.

    Raises:
        ConfigError: the variables are no numbers, or contradict each other.
    """
    if "MATPO_NUM_NODES" in env:
        names = ("MATPO_NODE_RANK", "MATPO_NUM_NODES")
        launch_id = env.get("MATPO_LAUNCH_ID", "0")
    elif "SLURM_STEP_ID" in env:
        names = ("SLURM_NODEID", "SLURM_STEP_NUM_NODES")
        launch_id = "-".join(
            env.get(key, "0") for key in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
        )
    else:
        return Allocation()
    rank, num_nodes = (_number(env, name) for name in names)
    if not 0 <= rank < num_nodes:
        raise ConfigError(f"{names[0]}={rank}: must be less than {names[1]}={num_nodes}")
    return Allocation(rank, num_nodes, re.sub(r"[^A-Za-z0-9_-]", "_", launch_id))


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "")
    if not text.isdigit():
        raise ConfigError(f"{name}={text}: expected a number")
    return int(text)
