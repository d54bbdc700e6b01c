"""Which role runs on which node and GPU, and on which port, for people."""

from __future__ import annotations

from megatron_matpo.config.plan import Offer, Plan, bind, place
from megatron_matpo.config.root import Config
from megatron_matpo.config.validate import Command


def node_plan_text(config: Config, command: Command) -> str:
    """The plan as one line per role and node; starts nothing and reserves no port."""
    base = config.cluster.base_port
    placement = place(config, has_trainer=command != "eval")
    offers = [
        Offer("", tuple(base + i if base else 0 for i in range(placement.num_ports(node))))
        for node in range(placement.num_nodes)
    ]
    return plan_text(bind(placement, offers), has_engines=_has_engines(config, command))


def plan_text(plan: Plan, *, has_engines: bool) -> str:
    """Roles of a plan by node; a port of 0 is chosen when the run starts."""
    lines: list[str] = []
    for node, ranks in enumerate(plan.trainer_ranks_per_node):
        if ranks:
            first = sum(plan.trainer_ranks_per_node[:node])
            who = (
                f"trainer ranks {first}-{first + ranks - 1}"
                if ranks > 1
                else f"trainer rank {first}"
            )
            lines.append(f"node {node:<3} {who:<24} rendezvous {_port(plan.trainer_port)}")
    if has_engines:
        lines.append(f"node {0:<3} {'rollout manager':<24} port {_port(plan.manager_port)}")
        for place in plan.engines:
            gpus = f"GPUs {','.join(map(str, place.gpus))}" if place.gpus else "CPU"
            lines.append(
                f"node {place.node:<3} {f'engine {place.index}, {gpus}':<24} "
                f"port {_port(place.port)}, internal {_port(place.internal_port)}"
            )
        lines.append(f"weight pushes: rendezvous {_port(plan.weight_sync_port)} on node 0")
    return "\n".join(lines)


def _port(number: int) -> str:
    return str(number) if number else "any free"


def _has_engines(config: Config, command: Command) -> bool:
    return command == "eval" or (command == "train" and not config.rollout.replay)
