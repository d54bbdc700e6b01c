"""The doctors of an allocation together: who came, clocks, collectives, one report at node 0."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from megatron_matpo.doctor.allocation import Allocation
from megatron_matpo.doctor.disk import standing
from megatron_matpo.doctor.groups import Outcome, as_message, rank_settings, report, run_ranks
from megatron_matpo.doctor.lines import Line, Site
from megatron_matpo.doctor.meeting import Host, Link, Message, Peer, PeerLostError, join
from megatron_matpo.doctor.network import own_addresses
from megatron_matpo.errors import DeadlineError
from megatron_matpo.launch.ports import free_ports

_NUM_PINGS = 5
Clock = Callable[[], float]
OwnChecks = Callable[[], list[Line]]


@dataclass(frozen=True)
class Verdict:
    """What a node knows at the end: node 0 everything, the others whether the run may start."""

    lines: list[Line]
    has_failed: bool
    is_reporter: bool
    """Whether this node prints."""


def has_failed(lines: list[Line]) -> bool:
    """Whether any line is a failure."""
    return any(line.status == "fail" for line in lines)


def check_alone(site: Site) -> list[Line]:
    """The collective checks on a single node."""
    ports = free_ports("127.0.0.1", 2)
    settings = rank_settings(site, 0, "127.0.0.1", ports)
    return report(site, [run_ranks(site, "", "127.0.0.1", settings)])


def lead(site: Site, allocation: Allocation, own_checks: OwnChecks, clock: Clock) -> Verdict:
    """Node 0: wait for the others, ask them, and judge."""
    doctor = site.config.doctor
    folder = standing(site.config.run.dir)
    try:
        host = Host(folder, allocation, own_addresses(site.config))
    except OSError as error:
        seen = f"cannot write to {folder}: {error.strerror or error}"
        return Verdict([Line("nodes.meeting", "fail", seen, "set run.dir")], True, True)
    with host, ThreadPoolExecutor(1) as pool:
        coming = pool.submit(host.gather, doctor.nodes_timeout_s)
        own = own_checks()
        coming.result()
        missing = sorted(set(range(1, allocation.num_nodes)) - set(host.peers))
        lines = [*own, *_meeting_lines(site, allocation, missing)]
        lines += _ask_lines(site, host)
        lines += _clock_lines(site, host, clock)
        if len(host.peers) < allocation.num_nodes - 1:
            seen = "not all nodes are there"
            names = ("nodes.allreduce", "nodes.weight_sync")
            lines += [Line(name, "skipped", seen) for name in names]
        else:
            lines += _collective_lines(site, allocation, host)
        failed = has_failed(lines)
        for peer in host.peers.values():
            _ask(peer, {"do": "end", "has_failed": failed}, doctor.nodes_timeout_s)
        return Verdict(lines, failed, True)


def _meeting_lines(site: Site, allocation: Allocation, missing: list[int]) -> list[Line]:
    name, limit = "nodes.meeting", site.config.doctor.nodes_timeout_s
    fix = (
        "see the end of that node's own output; run.dir must be one folder that all nodes share, "
        "and node 0 reachable from them"
    )
    if missing:
        return [
            Line(name, "fail", f"node {rank} did not come in {limit:g} s", fix) for rank in missing
        ]
    folder = standing(site.config.run.dir)
    return [Line(name, "pass", f"{allocation.num_nodes} nodes met in {folder}")]


def _ask(peer: Peer, message: Message, timeout_s: float) -> Message | PeerLostError:
    try:
        peer.link.send(message)
        return peer.link.receive(timeout_s)
    except PeerLostError as error:
        return error


def _ask_lines(site: Site, host: Host) -> list[Line]:
    """What the other nodes found on themselves; those that do not say it are let go."""
    doctor = site.config.doctor
    lines: list[Line] = []
    for peer in list(host.peers.values()):
        answer = _ask(peer, {"do": "lines"}, doctor.check_timeout_s + doctor.nodes_timeout_s)
        if isinstance(answer, PeerLostError):
            seen = f"node {peer.label} came, and then: {answer}"
            lines.append(Line("nodes.meeting", "fail", seen, "see the end of its own output"))
            host.peers.pop(peer.rank).link.close()
        else:
            lines += [Line(**item) for item in answer["lines"]]
    return lines


def _clock_lines(site: Site, host: Host, clock: Clock) -> list[Line]:
    """`nodes.clock`: offsets from node 0, by the round trip that took least."""
    name, limit = "nodes.clock", site.config.doctor.max_clock_skew_s
    offsets: dict[str, float] = {}
    for peer in host.peers.values():
        best = float("inf")
        for _ in range(_NUM_PINGS):
            before = clock()
            answer = _ask(peer, {"do": "time"}, site.config.doctor.nodes_timeout_s)
            after = clock()
            if isinstance(answer, PeerLostError):
                break  # it has a line of its own
            if after - before < best:
                best = after - before
                offsets[peer.label] = answer["time"] - (before + after) / 2
    fix = "start chrony or ntpd on the nodes"
    far = {label: offset for label, offset in offsets.items() if abs(offset) > limit}
    if far:
        return [
            Line(name, "warn", f"node {label} is {offset:+.2f} s from node 0", fix)
            for label, offset in far.items()
        ]
    if not offsets:
        return [Line(name, "skipped", "no other node to compare with")]
    return [Line(name, "pass", f"within {max(map(abs, offsets.values())):.3f} s of node 0")]


def _collective_lines(site: Site, allocation: Allocation, host: Host) -> list[Line]:
    doctor = site.config.doctor
    peers = list(host.peers.values())
    master = peers[0].link.own_address
    ports = free_ports("0.0.0.0", 2)
    outcomes: list[Outcome] = []
    asked: list[Peer] = []
    for peer in peers:
        message = {"do": "ranks", "ranks": rank_settings(site, peer.rank, master, ports)}
        try:
            peer.link.send(message)
            asked.append(peer)
        except PeerLostError as error:
            outcomes.append(Outcome(peer.label, "lost", str(error)))
    own = rank_settings(site, 0, master, ports)
    outcomes.append(run_ranks(site, allocation.label, master, own))
    for peer in asked:
        try:
            # All started at the same moment, so that their deadlines have passed with ours.
            answer = peer.link.receive(doctor.nodes_timeout_s)
            outcomes.append(Outcome(**answer))
        except PeerLostError as error:
            outcomes.append(Outcome(peer.label, "lost", str(error)))
    return report(site, outcomes)


def follow(site: Site, allocation: Allocation, own_checks: OwnChecks, clock: Clock) -> Verdict:
    """Any other node: come, look at itself, and answer until node 0 has done."""
    doctor = site.config.doctor
    try:
        link = join(lambda: standing(site.config.run.dir), allocation, doctor.nodes_timeout_s)
    except (DeadlineError, PeerLostError) as error:
        fix = "set run.dir to a folder that all nodes share; name their network (net.interface)"
        return Verdict(
            [Line("nodes.meeting", "fail", str(error), fix, allocation.label)], True, True
        )
    patience_s = doctor.nodes_timeout_s + doctor.check_timeout_s + doctor.collective_timeout_s
    lines = own_checks()
    try:
        return Verdict(lines, _serve(site, allocation, link, lines, clock, patience_s), False)
    except PeerLostError as error:
        line = Line("nodes.meeting", "fail", f"node 0: {error}", "see node 0", allocation.label)
        return Verdict([*lines, line], True, True)
    finally:
        link.close()


def _serve(
    site: Site,
    allocation: Allocation,
    link: Link,
    lines: list[Line],
    clock: Clock,
    patience_s: float,
) -> bool:
    """Answer node 0; returns whether anything has failed anywhere."""
    while True:
        message = link.receive(patience_s)
        answer: dict[str, Any] = {}
        match message.get("do"):
            case "lines":
                answer = {"lines": [asdict(line) for line in lines]}
            case "time":
                answer = {"time": clock()}
            case "ranks":
                answer = as_message(
                    run_ranks(site, allocation.label, link.own_address, message["ranks"])
                )
            case _:
                link.send({})
                return bool(message.get("has_failed", True))
        link.send(answer)
