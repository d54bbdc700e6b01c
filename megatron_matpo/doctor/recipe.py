"""What the commands that take a recipe would refuse of it, on this machine."""

from __future__ import annotations

from megatron_matpo.config.validate import Command, collect_violations
from megatron_matpo.doctor.lines import Line, Site
from megatron_matpo.launch.preflight import machine_violations

_COMMANDS: tuple[Command, ...] = ("train", "sft", "eval")


def check_recipe(site: Site) -> list[Line]:
    """`recipe`: nothing says which command it is for, so one that takes it is enough."""
    if not site.recipe:
        seen = "none is named: what one would need is not looked at"
        return [Line("recipe", "pass", seen)]
    wanted, started = site.config.cluster.num_nodes, site.num_nodes
    apart: list[str] = []
    if 1 < started != wanted:
        apart = [f"cluster.num_nodes={wanted}: the doctor was started on {started} nodes"]
    found: dict[Command, list[str]] = {}
    for command in _COMMANDS:
        problems = [*site.problems, *apart, *collect_violations(site.config, command=command)]
        problems += machine_violations(site.config, command)
        if not problems:
            alone = f" (on {wanted} nodes; this is one)" if started < wanted else ""
            seen = f"{site.recipe} is in order for matpo {command}{alone}"
            return [Line("recipe", "pass", seen)]
        found[command] = list(dict.fromkeys(problems))
    # The one that it comes nearest to, of those whose data it names.
    config = site.config
    named: dict[Command, object] = {
        "train": config.data.train,
        "sft": config.sft.data,
        "eval": config.eval.sets,
    }
    likely: list[Command] = [command for command in _COMMANDS if named[command]] or ["train"]
    fewest = min(likely, key=lambda command: len(found[command]))
    fix = f"for matpo {fewest}: change the recipe or override it: key=value"
    return [Line("recipe", "fail", problem, fix) for problem in found[fewest]]
