"""Network interfaces and InfiniBand ports, as the kernel shows them."""

from __future__ import annotations

import os
import re
import resource
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_matpo.config import Config
from megatron_matpo.doctor.lines import Line, Site
from megatron_matpo.launch.nodes import default_interface

_NCCL_VARIABLE = "NCCL_SOCKET_IFNAME"


def addresses() -> dict[str, str]:
    """Interface that is up -> its first IPv4 address."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return {
        name: next(item.address for item in items if item.family == socket.AF_INET)
        for name, items in psutil.net_if_addrs().items()
        if name in up and any(item.family == socket.AF_INET for item in items)
    }


def named_interface(config: Config) -> str:
    """What the recipe, else NCCL_SOCKET_IFNAME names, in NCCL's grammar; empty if neither does."""
    interface = config.cluster.interface
    return f"={interface}" if interface else os.environ.get(_NCCL_VARIABLE, "")


def matching(pattern: str, names: list[str]) -> list[str]:
    """Interfaces that NCCL takes for `pattern`: prefixes, `=` for exact names, `^` for all others.

    Source: docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html, NCCL_SOCKET_IFNAME.
    """
    is_excluding = pattern.startswith("^")
    rest = pattern.removeprefix("^")
    is_exact = rest.startswith("=")
    words = [word for word in rest.removeprefix("=").split(",") if word]

    def fits(name: str) -> bool:
        return any(name == word if is_exact else name.startswith(word) for word in words)

    return [name for name in names if fits(name) != is_excluding]


def own_addresses(config: Config) -> list[str]:
    """Addresses at which other nodes may reach this one, the likeliest first, loopback last."""
    found = addresses()
    if pattern := named_interface(config):
        return [found[name] for name in matching(pattern, list(found))]
    return sorted(found.values(), key=lambda address: address.startswith("127."))


def check_interface(site: Site) -> list[Line]:
    """`net.interface`: the named interface exists and has an address."""
    name, found = "net.interface", addresses()
    listing = ", ".join(f"{key} {value}" for key, value in found.items()) or "none with an address"
    pattern = named_interface(site.config)
    if pattern:
        taken = matching(pattern, list(found))
        if not taken:
            interface = site.config.cluster.interface
            setting = "cluster.interface" if interface else _NCCL_VARIABLE
            seen = f"{setting}={interface or pattern} fits no interface with an address: {listing}"
            return [Line(name, "fail", seen, f"name one of them: {setting}=IFACE")]
        return [Line(name, "pass", ", ".join(f"{key} {found[key]}" for key in taken))]
    if site.num_nodes == 1:
        return [Line(name, "pass", "none is named, and one node needs none")]
    fix = "name the nodes' own network: cluster.interface=IFACE"
    taken_one = default_interface(_read(site.root / "proc/net/route"))
    if taken_one not in found:
        seen = f"none is named, and no default route says which one to take; {listing}"
        return [Line(name, "fail", seen, fix)]
    seen = f"{taken_one} {found[taken_one]}, of the default route"
    usable = [address for address in found.values() if not address.startswith("127.")]
    if len(usable) > 1:
        seen = f"none is named, so the run takes {seen}; there are {listing}"
        return [Line(name, "warn", seen, fix)]
    return [Line(name, "pass", seen)]


@dataclass(frozen=True)
class Port:
    """One port of an InfiniBand (or RoCE) device."""

    name: str
    state: str
    gb_s: float
    """Each way."""
    link: str

    @property
    def is_active(self) -> bool:
        """Whether data flows."""
        return self.state == "ACTIVE"


def list_ports(root: Path) -> list[Port]:
    """All ports, by device and number."""
    ports: list[Port] = []
    for folder in sorted((root / "sys/class/infiniband").glob("*/ports/*")):
        device = folder.parents[1].name
        state = _read(folder / "state").rpartition(" ")[2]
        rate = re.match(r"[\d.]+", _read(folder / "rate"))
        link = _read(folder / "link_layer")
        gb_s = float(rate[0]) / 8 if rate else 0.0
        ports.append(Port(f"{device}:{folder.name}", state, gb_s, link))
    return ports


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def check_infiniband(site: Site) -> list[Line]:
    """`net.infiniband`: ports are active and usable from here."""
    name, ports = "net.infiniband", list_ports(site.root)
    active = [port for port in ports if port.is_active]
    needs = site.wants_gpus and site.num_nodes > 1
    if not ports:
        if needs:
            seen = "no device: NCCL goes over TCP between the nodes"
            fix = "load the driver (ibstat), or pass /dev/infiniband into the container"
            return [Line(name, "warn", seen, fix)]
        return [Line(name, "pass", "no device; nothing here needs one")]
    lines: list[Line] = []
    total = sum(port.gb_s for port in active)
    kinds = ", ".join(sorted({port.link for port in active if port.link}))
    seen = f"{len(active)} of {len(ports)} ports active ({kinds}), {total:.0f} GB/s each way"
    down = [f"{port.name} {port.state}" for port in ports if not port.is_active]
    if not active:
        status = "fail" if needs else "warn"
        fix = "cable, switch or subnet manager: ask the cluster's administrators (ibstat)"
        lines.append(Line(name, status, f"no port is active: {', '.join(down)}", fix))
    elif not any((site.root / "dev/infiniband").glob("uverbs*")):
        status = "fail" if needs else "warn"
        fix = (
            "pass /dev/infiniband into the container (docker: --device=/dev/infiniband; Enroot: "
            "MELLANOX_VISIBLE_DEVICES=all)"
        )
        lines.append(Line(name, status, f"{seen}, but no /dev/infiniband/uverbs* here", fix))
    elif down and needs:
        fix = "leave NCCL the active ones (NCCL_IB_HCA), or repair the cable"
        lines.append(Line(name, "warn", f"{seen}; not active: {', '.join(down)}", fix))
    return lines or [Line(name, "pass", seen)]


def check_locked_memory(site: Site) -> list[Line]:
    """`limit.memlock`: RDMA registers (locks) memory."""
    name = "limit.memlock"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return [Line(name, "pass", "unlimited")]
    seen = f"{soft // 1024} KiB"
    if not any(port.is_active for port in list_ports(site.root)):
        return [Line(name, "pass", f"{seen}; without InfiniBand nothing locks memory")]
    fix = "ulimit -l unlimited (docker: --ulimit memlock=-1; Slurm: PropagateResourceLimits)"
    return [Line(name, "warn", f"{seen}: RDMA may fail to register its buffers", fix)]
