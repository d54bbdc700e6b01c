"""The doctors of all nodes together: who came, clocks, collectives, one report at node 0."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from megatron_matpo.doctor.disk import standing
from megatron_matpo.doctor.groups import Outcome, as_message, rank_settings, report, run_ranks
from megatron_matpo.doctor.lines import Line, Site
from megatron_matpo.doctor.meeting import Host, Link, Message, Peer, PeerLostError, join
from megatron_matpo.doctor.network import own_addresses
from megatron_matpo.errors import ConfigError, DeadlineError
from megatron_matpo.launch.nodes import Node
from megatron_matpo.ports import free_ports

_NUM_PINGS = 5
Clock = Callable[[], float]
OwnChecks = Callable[[], list[Line]]


NOT_THIS_NODE = 3
"""Exit code of a node that is well itself, while another one is not, or nobody is to blame."""
Show = Callable[[list[Line]], None]


def label_of(node: Node) -> str:
    """As `Line.node`."""
    return f"{node.index} ({node.name})" if node.count > 1 else ""


def exit_code(lines: list[Line], node: int, count: int) -> int:
    """1 if the node has failed, 3 if only another one has; then the job must not start either.

    A wrong recipe is 2, as for all commands: neither another node nor another attempt helps.
    """
    failed = [line for line in lines if line.status == "fail"]
    if not failed:
        return 0
    if any(line.name == "recipe" for line in failed):
        return ConfigError.exit_code
    return 1 if count == 1 or any(line.node_index == node for line in failed) else NOT_THIS_NODE


def check_alone(site: Site) -> list[Line]:
    """The collective checks on a single node."""
    ports = free_ports("127.0.0.1", 2)
    settings = rank_settings(site, 0, "127.0.0.1", ports)
    return report(site, [run_ranks(site, "", "127.0.0.1", settings)])


def lead(site: Site, node: Node, own_checks: OwnChecks, clock: Clock, show: Show) -> int:
    """Node 0: wait for the others, ask them, judge, and report before anybody leaves.

    The first node that leaves with an error makes `srun --kill-on-bad-exit` end all others.
    """
    doctor = site.config.doctor
    folder = standing(site.config.run.dir)
    try:
        host = Host(folder, node, own_addresses(site.config))
    except OSError as error:
        seen = f"cannot write to {folder}: {error.strerror or error}"
        show([Line("nodes.meeting", "fail", seen, "set run.dir", label_of(node))])
        return 1
    with host, ThreadPoolExecutor(1) as pool:
        coming = pool.submit(host.gather, doctor.nodes_timeout_s)
        lines = own_checks()
        coming.result()
        missing = sorted(set(range(1, node.count)) - set(host.peers))
        lines += _meeting_lines(site, node, missing)
        lines += _ask_lines(site, host)
        lines += _clock_lines(site, host, clock)
        if len(host.peers) < node.count - 1:
            seen = "not all nodes are there"
            names = ("nodes.allreduce", "nodes.weight_sync")
            lines += [Line(name, "skipped", seen) for name in names]
        else:
            lines += _collective_lines(site, node, host)
        show(lines)
        for peer in host.peers.values():
            code = exit_code(lines, peer.rank, node.count)
            _ask(peer, {"do": "end", "code": code}, doctor.nodes_timeout_s)
    return exit_code(lines, 0, node.count)


def _meeting_lines(site: Site, node: Node, missing: list[int]) -> list[Line]:
    name, limit = "nodes.meeting", site.config.doctor.nodes_timeout_s
    fix = (
        "see the end of that node's own output; run.dir must be one folder that all nodes share, "
        "and node 0 reachable from them"
    )
    if missing:
        return [
            Line(name, "fail", f"did not come in {limit:g} s", fix, str(rank)) for rank in missing
        ]
    folder = standing(site.config.run.dir)
    return [Line(name, "pass", f"{node.count} nodes met in {folder}")]


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
            fix = "see the end of its own output"
            seen = f"came, and then: {answer}"
            lines.append(Line("nodes.meeting", "fail", seen, fix, peer.label))
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
            Line(name, "warn", f"its clock is {offset:+.2f} s from node 0's", fix, label)
            for label, offset in far.items()
        ]
    if not offsets:
        return [Line(name, "skipped", "no other node to compare with")]
    return [Line(name, "pass", f"within {max(map(abs, offsets.values())):.3f} s of node 0")]


def _collective_lines(site: Site, node: Node, host: Host) -> list[Line]:
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
    outcomes.append(run_ranks(site, label_of(node), master, own))
    for peer in asked:
        try:
            # All started at the same moment, so that their deadlines have passed with ours.
            answer = peer.link.receive(doctor.nodes_timeout_s)
            outcomes.append(Outcome(**answer))
        except PeerLostError as error:
            outcomes.append(Outcome(peer.label, "lost", str(error)))
    return report(site, outcomes)


def follow(site: Site, node: Node, own_checks: OwnChecks, clock: Clock, show: Show) -> int:
    """Any other node: come, look at itself, and answer until node 0 has done.

    It shows only what node 0 will not: that it did not come there, or was left alone.
    """
    doctor = site.config.doctor
    try:
        link = join(lambda: standing(site.config.run.dir), node, doctor.nodes_timeout_s)
    except (DeadlineError, PeerLostError) as error:
        fix = "set run.dir to a folder that all nodes share; name their network (net.interface)"
        show([Line("nodes.meeting", "fail", str(error), fix, label_of(node))])
        return 1
    patience_s = doctor.nodes_timeout_s + doctor.check_timeout_s + doctor.collective_timeout_s
    try:
        lines = own_checks()
        return _serve(site, node, link, lines, clock, patience_s)
    except PeerLostError as error:
        show([Line("nodes.meeting", "fail", f"node 0: {error}", "see its own output")])
        return NOT_THIS_NODE
    finally:
        link.close()


def _serve(
    site: Site, node: Node, link: Link, lines: list[Line], clock: Clock, patience_s: float
) -> int:
    """Answer node 0 until it says with which code to end."""
    while True:
        message = link.receive(patience_s)
        answer: dict[str, Any] = {}
        match message.get("do"):
            case "lines":
                answer = {"lines": [asdict(line) for line in lines]}
            case "time":
                answer = {"time": clock()}
            case "ranks":
                ranks = message["ranks"]
                answer = as_message(run_ranks(site, label_of(node), link.own_address, ranks))
            case _:
                link.send({})
                return int(message.get("code", NOT_THIS_NODE))
        link.send(answer)
