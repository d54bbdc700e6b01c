"""Free TCP ports that two runs, started at the same moment, never share.

A port that is free now can be taken between the test and the start of the server that is to use
it. Against other runs of ours a lock file per port (`TMP/matpo-ports-UID/PORT.lock`, flock) settles
it: the lock is held until this process and its forks have ended, and the kernel drops it then,
however they end. Against everything else ports are picked below the system's ephemeral range, from
which outgoing connections take theirs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

from megatron_matpo.errors import MatpoError

_LOWEST = 12000
_DEFAULT_EPHEMERAL_LOW = 32768
_MAX_TRIES = 2000

_held: dict[int, int] = {}
"""Port -> file descriptor of its lock; open until the process ends."""


def free_ports(host: str, n: int, base_port: int = 0) -> list[int]:
    """Reserve `n` ports on `host` for the rest of this process's life.

    With `base_port` > 0 they are `base_port .. base_port + n - 1`, else any free ones.

    Raises:
        MatpoError: a port of the wanted range is taken, or no free port can be found; the message
            names the port, the setting and, where it can be seen, the process.
    """
    if base_port > 0:
        return _consecutive(host, n, base_port)
    ports: list[int] = []
    low, high = _LOWEST, _ephemeral_low()
    for _ in range(_MAX_TRIES):
        if len(ports) == n:
            break
        port = random.SystemRandom().randrange(low, high)
        if _reserve(port):
            if _bind_error(host, port) is None:
                ports.append(port)
            else:
                _release(port)
    if len(ports) < n:
        raise MatpoError(f"no {n} free ports between {low} and {high} on cluster.host={host}")
    return ports


def holder_of(port: int) -> str:
    """The process that listens on `port`, as `name (pid N)`, or empty if it cannot be seen."""
    inodes = _listening_inodes(port)
    if not inodes:
        return ""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(_link_target(link) in inodes for link in (folder / "fd").iterdir()):
                name = (folder / "comm").read_text().strip()
                return f"{name} (pid {folder.name})"
    return ""


def _link_target(link: Path) -> str:
    """Where `link` points, or empty if it is gone (files are closed while we look)."""
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _consecutive(host: str, n: int, base_port: int) -> list[int]:
    """The range at `base_port`, or an error that names the first taken port."""
    ports = list(range(base_port, base_port + n))
    if ports[-1] > 65535:
        raise MatpoError(f"cluster.base_port={base_port}: {n} ports are needed, up to 65535")
    for port in ports:
        reserved = _reserve(port)
        problem = _bind_error(host, port) if reserved else "another run has reserved it"
        if problem is None:
            continue
        for taken in ports:
            _release(taken)
        holder = holder_of(port)
        by = f" by {holder}" if holder else ""
        raise MatpoError(
            f"port {port} on {host} is taken{by} ({problem}); this run needs ports "
            f"{ports[0]}-{ports[-1]} (cluster.base_port={base_port}); choose another base port, "
            "or 0 for any free ports"
        )
    return ports


def _bind_error(host: str, port: int) -> str | None:
    """Why `port` cannot be bound, or None if it can."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As servers do: connections of an earlier run in TIME_WAIT do not hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _reserve(port: int) -> bool:
    """Take the lock of `port`; False if this or another process has it."""
    if port in _held:
        return False
    folder = Path(tempfile.gettempdir()) / f"matpo-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(folder / f"{port}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return False
    _held[port] = descriptor
    return True


def _release(port: int) -> None:
    descriptor = _held.pop(port, None)
    if descriptor is not None:
        os.close(descriptor)


def _ephemeral_low() -> int:
    """First port that the system gives to outgoing connections."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        if low > _LOWEST + _MAX_TRIES:
            return low
    return _DEFAULT_EPHEMERAL_LOW


def _listening_inodes(port: int) -> set[str]:
    """Links `socket:[INODE]` of the listeners on `port`."""
    inodes: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                is_listening = fields[3] == "0A"
                if is_listening and int(fields[1].rsplit(":", 1)[1], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    return inodes
