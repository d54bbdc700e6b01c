"""Which node this process is on, of how many, and in which start of the run.

The same command runs once on every node. Slurm says which one this is (`srun`, one task per node);
other schedulers, and people, say it with MATPO_NODE_RANK, MATPO_NUM_NODES and MATPO_LAUNCH_ID.
"""

from __future__ import annotations

import fcntl
import re
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_matpo.config.plan import LEADER
from megatron_matpo.config.run import ClusterConfig
from megatron_matpo.errors import ConfigError

_SIOCGIFADDR = 0x8915
_ROUTES = Path("/proc/net/route")
_NAME_BYTES = 15
_NETWORK = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_LAUNCH_ID = re.compile(r"[A-Za-z0-9._-]+")
_OWN = ("MATPO_NODE_RANK", "MATPO_NUM_NODES", "MATPO_LAUNCH_ID")


@dataclass(frozen=True)
class Node:
    """One node of a start."""

    index: int
    count: int
    launch_id: str
    """The same on all nodes of one start, never that of another; fit for a file name."""
    name: str
    """What the scheduler calls the node, for people and exclude lists."""

    @property
    def is_leader(self) -> bool:
        """It opens the run's folder and names the first failure."""
        return self.index == LEADER


def this_node(environ: Mapping[str, str]) -> Node:
    """Read the environment; without a word of a scheduler there is one node.

    Raises:
        ConfigError: the variables are incomplete, or srun was not asked for one task per node.
    """
    given = [name for name in _OWN if environ.get(name)]
    if given:
        return _from_own(environ, given)
    if "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        return _from_slurm(environ)
    return Node(LEADER, 1, "local", socket.gethostname())


def check_nodes(node: Node, cluster: ClusterConfig) -> None:
    """Raise unless the command runs on as many nodes as the recipe says.

    Raises:
        ConfigError: what to change.
    """
    if node.count == cluster.num_nodes:
        return
    started = "one node" if node.count == 1 else f"{node.count} nodes"
    raise ConfigError(
        f"cluster.num_nodes={cluster.num_nodes}: the command was started on {started}; start it "
        "once on every node (srun --ntasks-per-node=1, or MATPO_NODE_RANK, MATPO_NUM_NODES and "
        "MATPO_LAUNCH_ID), or set cluster.num_nodes"
    )


def address_of(cluster: ClusterConfig) -> str:
    """Address that this node's servers bind to.

    Raises:
        ConfigError: the interface does not exist here or has no IPv4 address.
    """
    name = interface_of(cluster)
    if not name:
        return cluster.host
    try:
        return interface_address(name)
    except OSError as error:
        raise ConfigError(
            f"cluster.interface={name}: no IPv4 address on {socket.gethostname()} "
            f"({error.strerror or error}); its interfaces are {_interfaces()}"
        ) from error


def interface_of(cluster: ClusterConfig) -> str:
    """Interface that the nodes reach each other through; empty on one node, if none is named.

    Raises:
        ConfigError: several nodes, none is named, and this node has no default route.
    """
    if cluster.interface or cluster.num_nodes == 1:
        return cluster.interface
    name = default_interface(_ROUTES.read_text())
    if not name:
        raise ConfigError(
            f"cluster.interface=: {socket.gethostname()} has no default route, so the interface "
            f"between the nodes must be named; its interfaces are {_interfaces()}"
        )
    return name


def network_variables(cluster: ClusterConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """What NCCL and gloo are told of the network between the nodes.

    `cluster.interface`; if that is empty what `environ` says, else the default route's interface.

    Raises:
        ConfigError: as `interface_of`.
    """
    interface = interface_of(cluster)
    wanted = [name for name in _NETWORK if cluster.interface or not environ.get(name)]
    return dict.fromkeys(wanted, interface) if interface else {}


def default_interface(routes: str) -> str:
    """Interface of the default route with the lowest metric, from /proc/net/route; or empty."""
    lines = [line.split() for line in routes.splitlines()[1:]]
    found = [(int(f[6]), f[0]) for f in lines if len(f) > 7 and f[1] == f[7] == "00000000"]
    return min(found)[1] if found else ""


def _interfaces() -> str:
    return ", ".join(name for _, name in socket.if_nameindex())


def interface_address(name: str) -> str:
    """First IPv4 address of a network interface.

    Raises:
        OSError: there is no such interface, or it has no address.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # struct ifreq: the name in 16 bytes, then a sockaddr whose bytes 4 to 8 are the address.
        request = struct.pack("256s", name.encode()[:_NAME_BYTES])
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
    return socket.inet_ntoa(answer[20:24])


def _from_own(environ: Mapping[str, str], given: list[str]) -> Node:
    missing = [name for name in _OWN if name not in given]
    if missing:
        raise ConfigError(f"{', '.join(given)} without {', '.join(missing)}: set all or none")
    index, count = _number(environ, "MATPO_NODE_RANK"), _number(environ, "MATPO_NUM_NODES")
    if index >= count:
        raise ConfigError(
            f"MATPO_NODE_RANK={index}: must be less than MATPO_NUM_NODES={count}; the first is 0"
        )
    launch_id = environ["MATPO_LAUNCH_ID"]
    if not _LAUNCH_ID.fullmatch(launch_id):
        raise ConfigError(
            f"MATPO_LAUNCH_ID={launch_id}: letters, digits, '.', '_' and '-'; new for every start"
        )
    return Node(index, count, launch_id, socket.gethostname())


def _from_slurm(environ: Mapping[str, str]) -> Node:
    count = _number(environ, "SLURM_STEP_NUM_NODES")
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS")
    if tasks != count:
        raise ConfigError(
            f"srun started {tasks} tasks on {count} nodes; matpo starts the processes of a node "
            "itself: use --ntasks-per-node=1"
        )
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    launch_id = f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}.{restarts}"
    name = environ.get("SLURMD_NODENAME", socket.gethostname())
    return Node(_number(environ, "SLURM_PROCID"), count, launch_id, name)


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not value.isdecimal():
        raise ConfigError(f"{name}={value}: expected a whole number")
    return int(value)
