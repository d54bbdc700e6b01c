"""The collective checks from outside: who gets which rank, and what came of it. Torch-free.

The ranks themselves are processes of `doctor.collectives`; each node starts its own and reports how
far they came. A node that hangs is found by comparing: it is the one that came least far, or, among
equals, that failed first.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_matpo.config.gpus import GPUS
from megatron_matpo.doctor.child import Answer, ask
from megatron_matpo.doctor.lines import Line, Site
from megatron_matpo.doctor.network import addresses, list_ports
from megatron_matpo.errors import ConfigError
from megatron_matpo.launch.nodes import network_variables

STAGES = ("lost", "start", "meet", "all-reduce", "weight-sync group", "broadcast", "done")
"""How far a rank came; `lost`: its node gave no answer."""
_SYNC_STAGE = STAGES.index("weight-sync group")
_CPU_RANKS_ALONE = 2
_CPU_SHARE = 10
_PREFLIGHT_MIB = 64
_GRACE_S = 15.0
"""A rank gives up by itself, with a reason, before its parent kills it."""


@dataclass(frozen=True)
class Outcome:
    """How far the ranks of one node came."""

    node: str
    stage: str
    """Of the rank that came least far."""
    problem: str = ""
    seconds: float = 0.0
    """When that rank ended."""
    gb_s: float = 0.0
    sync_s: float = 0.0

    @property
    def depth(self) -> int:
        """Larger is farther."""
        return STAGES.index(self.stage)


def ranks_per_node(site: Site) -> int:
    """One for each GPU; on CPUs one per node, or two on a single node."""
    if site.wants_gpus:
        return site.config.cluster.gpus_per_node
    return 1 if site.num_nodes > 1 else _CPU_RANKS_ALONE


def rank_settings(site: Site, node: int, master: str, ports: Sequence[int]) -> list[dict[str, Any]]:
    """The `collectives.Rank`s of one node, as dictionaries.

    The first rank of every node is in the weight-sync group, as the trainer's first rank and the
    engines will be; on a single node all ranks are.
    """
    per_node, doctor = ranks_per_node(site), site.config.doctor
    is_alone = site.num_nodes == 1
    mib = doctor.allreduce_mib if site.mode == "full" else min(doctor.allreduce_mib, _PREFLIGHT_MIB)
    num_bytes = mib * 2**20 // (1 if site.wants_gpus else _CPU_SHARE)
    return [
        {
            "master": master,
            "port": ports[0],
            "sync_port": ports[1],
            "rank": node * per_node + local,
            "world_size": site.num_nodes * per_node,
            "gpu": local if site.wants_gpus else -1,
            "sync_rank": local if is_alone else (node if local == 0 else -1),
            "sync_size": per_node if is_alone else site.num_nodes,
            "num_bytes": num_bytes,
            "timeout_s": max(1.0, doctor.collective_timeout_s - _GRACE_S),
        }
        for local in range(per_node)
    ]


def run_ranks(
    site: Site, node: str, own_address: str, settings: Sequence[dict[str, Any]]
) -> Outcome:
    """Start the ranks of this node, and wait for them until the deadline.

    They get the network that the run's roles get. `own_address` is where node 0 is talked
    to; gloo, which otherwise takes what the host's name resolves to, is given its interface where
    that is still open.
    """
    module = "megatron_matpo.doctor.collectives"
    env = {"OMP_NUM_THREADS": "1"}
    interface = next((key for key, value in addresses().items() if value == own_address), "")
    with contextlib.suppress(ConfigError):  # no default route: `net.interface` has a line on it
        cluster = replace(site.config.cluster, num_nodes=site.num_nodes)
        env |= network_variables(cluster, os.environ)
    if interface and "GLOO_SOCKET_IFNAME" not in os.environ | env:
        env["GLOO_SOCKET_IFNAME"] = interface

    def run(setting: dict[str, Any]) -> Answer:
        argv = [sys.executable, "-m", module, json.dumps(setting)]
        return ask(argv, site.config.doctor.collective_timeout_s, env)

    with ThreadPoolExecutor(len(settings)) as pool:
        answers = list(pool.map(run, settings))
    outcomes = [_outcome(node, answer) for answer in answers]
    worst = min(outcomes, key=lambda item: (item.depth, item.seconds))
    if worst.stage != "done":
        return worst
    return Outcome(
        node,
        "done",
        worst.problem,
        worst.seconds,
        min(item.gb_s for item in outcomes),
        max(item.sync_s for item in outcomes),
    )


def _outcome(node: str, answer: Answer) -> Outcome:
    said: list[dict[str, Any]] = [
        json.loads(line) for line in answer.output.splitlines() if line.startswith('{"stage"')
    ]
    last: dict[str, Any] = said[-1] if said else {"stage": "start"}
    done = last["stage"] == "done"
    return Outcome(
        node,
        last["stage"],
        "" if done else answer.problem or "it ended",
        answer.seconds,
        last["gb_s"] if done else 0.0,
        last["sync_s"] if done else 0.0,
    )


def as_message(outcome: Outcome) -> dict[str, Any]:
    """For node 0."""
    return asdict(outcome)


def expectation(site: Site) -> tuple[float, str]:
    """The least bus bandwidth in GB/s that is no warning, and where it comes from; 0: none."""
    config = site.config
    if config.doctor.min_allreduce_gb_s > 0:
        return config.doctor.min_allreduce_gb_s, "doctor.min_allreduce_gb_s"
    if not site.wants_gpus:
        return 0.0, ""
    if site.num_nodes == 1:
        gpu = GPUS.get(config.cluster.gpu)
        # The table has both directions together.
        return (gpu.nvlink_gb_s / 4, f"half of {gpu.name}'s NVLink") if gpu else (0.0, "")
    active = [port for port in list_ports(site.root) if port.is_active]
    half = sum(port.gb_s for port in active) / 2
    return (half, f"half of {len(active)} active InfiniBand ports") if active else (0.0, "")


def report(site: Site, outcomes: Sequence[Outcome]) -> list[Line]:
    """`nodes.allreduce` and `nodes.weight_sync`."""
    depth = min(item.depth for item in outcomes)
    if depth < _SYNC_STAGE:
        fix = (
            "look at net.interface and net.infiniband of the node that is named, run again with "
            "NCCL_DEBUG=INFO, or leave it out (`--exclude`)"
        )
        why = Line("nodes.weight_sync", "skipped", "the all-reduce comes first")
        return [*_blame("nodes.allreduce", outcomes, fix), why]
    first = _bandwidth(site, min(item.gb_s for item in outcomes) if depth == _DONE else 0.0)
    if depth < _DONE:
        fix = "are the ports between the nodes open? NCCL_CUMEM_ENABLE must be the same everywhere"
        return [first, *_blame("nodes.weight_sync", outcomes, fix)]
    num_members = ranks_per_node(site) if site.num_nodes == 1 else site.num_nodes
    took = max(item.sync_s for item in outcomes)
    seen = f"a group of {num_members} and one bucket in {took:.1f} s"
    return [first, Line("nodes.weight_sync", "pass", seen)]


_DONE = STAGES.index("done")


def _bandwidth(site: Site, gb_s: float) -> Line:
    world = site.num_nodes * ranks_per_node(site)
    backend = "NCCL" if site.wants_gpus else "gloo"
    if not gb_s:
        return Line("nodes.allreduce", "pass", f"{world} ranks over {backend}")
    seen = f"{gb_s:.2f} GB/s bus bandwidth, {world} ranks over {backend}"
    least, source = expectation(site)
    if not least:
        return Line("nodes.allreduce", "pass", f"{seen}; no expectation is known")
    seen += f"; expected at least {least:.4g} ({source})"
    if gb_s < least:
        fix = "run with NCCL_DEBUG=INFO: are all ports, GPUDirect RDMA and NVLink in use?"
        return Line("nodes.allreduce", "warn", seen, fix)
    return Line("nodes.allreduce", "pass", seen)


def _blame(name: str, outcomes: Sequence[Outcome], fix: str) -> list[Line]:
    """A line for each node that came least far; one for all if none came farther than another."""
    ordered = sorted(outcomes, key=lambda item: (item.depth, item.seconds))
    least = [item for item in ordered if item.depth == ordered[0].depth]
    rest = sorted({item.stage for item in ordered if item.depth > ordered[0].depth})
    if not rest:
        first = ordered[0]
        where = f"; node {first.node} was the first" if first.node else ""
        seen = f"all stopped at '{first.stage}': {first.problem}{where}"
        return [Line(name, "fail", seen, fix)]
    return [
        Line(
            name,
            "fail",
            f"stopped at '{item.stage}' after {item.seconds:.0f} s: {item.problem}; others came to "
            f"'{', '.join(rest)}'",
            fix,
            item.node,
        )
        for item in least
    ]
