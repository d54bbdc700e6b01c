"""`matpo doctor`: runs the checks of one node, and with other nodes those of all together."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from dataclasses import dataclass, replace

from megatron_matpo.config.load import collect_recipe
from megatron_matpo.config.validate import check_values
from megatron_matpo.doctor.catalogue import CHECKS
from megatron_matpo.doctor.lines import Check, Line, Mode, Site
from megatron_matpo.doctor.nodes import Clock, check_alone, exit_code, follow, label_of, lead
from megatron_matpo.doctor.services import secrets
from megatron_matpo.doctor.text import as_json, as_text, without_secrets
from megatron_matpo.errors import ConfigError
from megatron_matpo.launch.nodes import this_node

_GRACE_S = 5.0
"""Children have the same deadline, and a check can say more about them than its own deadline."""


@dataclass(frozen=True)
class Request:
    """What was asked on the command line."""

    recipe: str = ""
    overrides: tuple[str, ...] = ()
    mode: Mode = "full"
    is_json: bool = False


def doctor(request: Request, clock: Clock = time.time) -> int:
    """Check, print, and return the exit code: 1 if anything failed here, 3 if on another node.

    Raises:
        ConfigError: the recipe or an override cannot be read at all, or the environment's numbers
            of nodes contradict each other.
    """
    node = this_node(os.environ)
    site = replace(read_site(request), num_nodes=node.count)

    def own_checks() -> list[Line]:
        lines = without_secrets(run_checks(site, CHECKS), secrets(site.config))
        return [replace(line, node=label_of(node)) for line in lines]

    def show(lines: list[Line]) -> None:
        is_brief = site.mode == "preflight"
        lines = without_secrets(lines, secrets(site.config))
        text = as_json(lines) if request.is_json else as_text(lines, is_brief=is_brief)
        print(text, end="", flush=True)

    if node.count == 1 or site.mode == "build":
        lines = own_checks()
        if site.mode == "full":
            lines += check_alone(site)
        show(lines)
        return exit_code(lines, 0, 1)
    take_part = lead if node.index == 0 else follow
    return take_part(site, node, own_checks, clock, show)


def read_site(request: Request) -> Site:
    """The configuration, and all that is wrong with it.

    Raises:
        ConfigError: a file cannot be read at all.
    """
    if not request.recipe:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as empty:
            empty.write("{}")
            empty.flush()
            config, problems = collect_recipe(empty.name, list(request.overrides))
        if problems := [*problems, *check_values(config)]:
            raise ConfigError("\n".join(problems))
        return Site(config=config, mode=request.mode)
    config, problems = collect_recipe(request.recipe, list(request.overrides))
    return Site(
        config=config,
        mode=request.mode,
        problems=tuple(dict.fromkeys(problems)),
        recipe=request.recipe,
    )


def run_checks(site: Site, checks: tuple[Check, ...]) -> list[Line]:
    """All checks of the site's mode, at the same time, each with the deadline of its own.

    A check that breaks or does not end is a failure of that name; the others go on.
    """
    chosen = [check for check in checks if check.is_part_of(site.mode)]
    left_out = [check for check in checks if check not in chosen and site.mode == "build"]
    results: list[list[Line] | None] = [None] * len(chosen)

    def run(index: int, check: Check) -> None:
        try:
            results[index] = check.run(site)
        except Exception as error:
            seen = f"the check itself broke: {type(error).__name__}: {error}"
            results[index] = [Line(check.name, "fail", seen, "please report this")]

    # Daemons: a thread that hangs in a dead file system must not hold the process.
    threads = [
        threading.Thread(target=run, args=(index, check), name=check.name, daemon=True)
        for index, check in enumerate(chosen)
    ]
    timeout_s = site.config.doctor.check_timeout_s
    deadline = time.monotonic() + timeout_s + _GRACE_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [
        line
        for check, result in zip(chosen, results, strict=True)
        for line in (result if result is not None else [_overdue(check, timeout_s)])
    ] + [Line(check.name, "skipped", "needs the machine that runs it") for check in left_out]


def _overdue(check: Check, timeout_s: float) -> Line:
    seen = f"no answer in {timeout_s:g} s"
    fix = f"{check.fix}; the deadline is doctor.check_timeout_s"
    return Line(check.name, "fail", seen, fix)
