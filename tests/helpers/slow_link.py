"""Two hosts on one machine and a slow, lossy link: network namespaces and two TUN devices.

The kernel's own emulator (netem) is missing on many machines, so packets pass through a process,
which holds each back and drops some: `python tests/helpers/slow_link.py FROM TO DELAY_S LOSS`.
Needs root, iproute2 and /dev/net/tun.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

INTERFACE = "wan0"
"""Of either host."""
_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_MAX_PACKET = 65536


@dataclass(frozen=True)
class Host:
    """A network namespace."""

    name: str
    address: str

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv`, run on this host."""
        return ["ip", "netns", "exec", self.name, *argv]


def why_not() -> str:
    """Why this machine cannot have such hosts; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip") or not os.path.exists("/dev/net/tun"):
        return "no iproute2 or no /dev/net/tun"
    made = subprocess.run(["unshare", "--net", "true"], capture_output=True)
    return "" if made.returncode == 0 else "network namespaces are not allowed here"


@contextlib.contextmanager
def two_hosts(*, delay_s: float, loss: float) -> Iterator[tuple[Host, Host]]:
    """Hosts whose packets to each other take `delay_s` one way; a share of `loss` is lost."""
    hosts = [Host(f"matpo-{os.getpid()}-{i}", f"10.77.0.{i}") for i in (1, 2)]
    relay = None
    try:
        for host in hosts:
            _run("ip", "netns", "add", host.name)
            _run(*host.command(["ip", "link", "set", "lo", "up"]))
        names = [host.name for host in hosts]
        relay = subprocess.Popen(
            [sys.executable, __file__, *names, str(delay_s), str(loss)], stdout=subprocess.PIPE
        )
        assert relay.stdout is not None and relay.stdout.readline() == b"ready\n"
        for host, peer in zip(hosts, reversed(hosts), strict=True):
            address = ["ip", "address", "add", host.address, "peer", peer.address]
            _run(*host.command([*address, "dev", INTERFACE]))
            _run(*host.command(["ip", "link", "set", INTERFACE, "up"]))
        yield hosts[0], hosts[1]
    finally:
        if relay is not None:
            relay.kill()
            relay.wait()
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


def _open_tun(namespace: str) -> int:
    """A TUN device in the namespace; this process is in it afterwards."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", INTERFACE.encode(), _IFF_TUN | _IFF_NO_PI))
    return device


def _relay(first: int, second: int, delay_s: float, loss: float) -> None:
    """Carry packets for ever."""
    chance = random.Random(0)
    other = {first: second, second: first}
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        left_s = waiting[0][0] - time.monotonic() if waiting else 1.0
        readable, _, _ = select.select([first, second], [], [], max(0.0, left_s))
        for device in readable:
            packet = os.read(device, _MAX_PACKET)
            if chance.random() >= loss:
                number += 1
                due = time.monotonic() + delay_s
                heapq.heappush(waiting, (due, number, other[device], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, device, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # as a link that is full: the packet is lost
                os.write(device, packet)


def main() -> None:
    """The process between the hosts."""
    devices = [_open_tun(name) for name in sys.argv[1:3]]
    print("ready", flush=True)
    _relay(devices[0], devices[1], float(sys.argv[3]), float(sys.argv[4]))


if __name__ == "__main__":
    main()
