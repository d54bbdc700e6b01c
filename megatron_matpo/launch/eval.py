"""`matpo eval`: engines, manager and the evaluation process under the same supervisor as a run."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_matpo.config.load import load_resolved
from megatron_matpo.config.root import Config
from megatron_matpo.config.validate import collect_warnings
from megatron_matpo.data.dataset import read_questions
from megatron_matpo.errors import ConfigError
from megatron_matpo.evaluation.asked import open_sets
from megatron_matpo.evaluation.inputs import (
    FOLDER,
    Inputs,
    has_results,
    merge_inputs,
    model_fingerprint,
    read_inputs,
    set_fingerprint,
    write_inputs,
)
from megatron_matpo.evaluation.report import JSON_FILE, TEXT_FILE, write_report
from megatron_matpo.launch.console import Console
from megatron_matpo.launch.meeting import Meeting
from megatron_matpo.launch.run_folder import CONFIG_FILE, changed_settings, open_run_folder
from megatron_matpo.launch.start import NoView, Start, check_on_node, follow, lead, supervise
from megatron_matpo.obs.progress import format_duration
from megatron_matpo.obs.status import read_status

_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")
# Last parts of a model's path that say nothing: RUN/checkpoints/hf is called RUN.
_NAMELESS = ("hf", "checkpoints", "")
_SPINNER = "|/-\\"


@dataclass(frozen=True)
class EvalRequest:
    """The command line of `matpo eval`."""

    recipe: str
    model: str
    data: list[str]
    """Replaces `eval.sets`; empty: the recipe's."""
    samples: int | None = None
    """Replaces `eval.samples_per_row`."""
    max_rows: int | None = None
    """Replaces `eval.max_rows`."""
    overrides: list[str] = field(default_factory=list[str])
    accept_changes: bool = False

    def all_overrides(self) -> list[str]:
        """The options as overrides, after those of the user.

        The run is called after recipe and model unless the user names it: the recipe's own name
        belongs to its training run.
        """
        # JSON is YAML; a path may hold what YAML would read as something else.
        options = [
            f"model.path={json.dumps(str(Path(self.model)))}",
            "data.train=",
            "rollout.replay=",
        ]
        if self.data:
            options.append(f"eval.sets={json.dumps(self.data)}")
        if self.samples is not None:
            options.append(f"eval.samples_per_row={self.samples}")
        if self.max_rows is not None:
            options.append(f"eval.max_rows={self.max_rows}")
        named = f"run.name={json.dumps(default_name(self.recipe, self.model))}"
        return [named, *self.overrides, *options]


def default_name(recipe: str, model: str) -> str:
    """`eval-RECIPE-MODEL`, fit for a folder."""
    parts = [part for part in Path(model).parts if part not in _NAMELESS]
    name = f"eval-{Path(recipe).stem}-{parts[-1] if parts else 'model'}"
    return _UNFIT.sub("_", name)


def evaluate(request: EvalRequest) -> int:
    """Evaluate to the end and return the exit code (see `launch.supervisor`).

    Raises:
        ConfigError: nothing was started; one line for every violation.
        MatpoError: the run folder is in use, a port is taken, or another node gave up; nothing was
            started.
    """
    config, meeting = check_on_node(request.recipe, request.all_overrides(), "eval")
    with meeting.explaining():
        if not meeting.node.is_leader:
            start = follow(config, meeting, has_trainer=False)
            console = Console(sys.stdout, prefix=f"{meeting.name_of(meeting.node.index)}: ")
            if start is None:
                return 0
            return supervise(start, "eval", console, NoView(), lambda code: None)
        console = Console(sys.stdout)
        start = _begin(config, meeting, console, accept_changes=request.accept_changes)
    if start is None:
        meeting.leave(0, "nothing is missing")
        return 0
    began = time.monotonic()

    def after(code: int) -> None:
        if code == 0:
            elapsed = format_duration(time.monotonic() - began)
            where = f"{config.run_dir}/{FOLDER}/{JSON_FILE}"
            console.line(_report(start.run_dir) + f"done in {elapsed}; results in {where}")

    return supervise(start, "eval", console, EvalView(start.run_dir, console), after)


def _begin(
    config: Config, meeting: Meeting, console: Console, *, accept_changes: bool
) -> Start | None:
    """The leader's part before any role starts; None if no episode is missing."""
    for warning in collect_warnings(config, command="eval"):
        console.line(f"warning: {warning}")
    path = Path(config.run_dir).resolve()
    inputs = _checked_inputs(config, path, accept_changes=accept_changes)
    folder, is_resumed = open_run_folder(config, "eval", accept_changes=accept_changes)
    write_inputs(folder.path, inputs)
    sets = open_sets(config, folder.path)
    if not any(item.missing() for item in sets):
        write_report(config, folder.path, sets)
        console.line(_report(folder.path) + f"nothing is missing in {config.run_dir}")
        return None
    for name in (TEXT_FILE, JSON_FILE):  # of an earlier start that asked for less
        (folder.path / FOLDER / name).unlink(missing_ok=True)
    start = lead(config, folder, meeting, has_trainer=False)
    count, names = config.rollout.num_servers, ", ".join(config.eval.named_sets)
    console.line(
        f"{'resuming' if is_resumed else 'starting'} {config.run_dir} on {config.cluster.device}: "
        f"{count} engine{'s' * (count > 1)} with {config.model.path}, evaluating {names}"
    )
    return start


def _report(run_dir: Path) -> str:
    return f"\n{(run_dir / FOLDER / TEXT_FILE).read_text(encoding='utf-8')}\n"


def _checked_inputs(config: Config, run_dir: Path, *, accept_changes: bool) -> Inputs:
    """What is evaluated, after a comparison with what the folder holds results of.

    Raises:
        ConfigError: the model or a set has changed. Settings are checked by `open_run_folder`.
    """
    sets = {
        name: set_fingerprint(read_questions(entry, config.data.folder))
        for name, entry in config.eval.named_sets.items()
    }
    now = Inputs(model_fingerprint(Path(config.model.path)), sets)
    if not has_results(run_dir):
        return now
    name = config.run.name
    inputs = merge_inputs(read_inputs(run_dir), now, name, accept_changes=accept_changes)
    is_mixed = inputs.has_mixed_settings or _differs(config, run_dir)
    return replace(inputs, has_mixed_settings=is_mixed)


def _differs(config: Config, run_dir: Path) -> bool:
    """The earlier results were made with other settings (or it cannot be told)."""
    try:
        return bool(changed_settings(load_resolved(str(run_dir / CONFIG_FILE)), config, "eval"))
    except ConfigError:
        return True


class EvalView:
    """Follows the evaluation's status file and shows it on a console."""

    def __init__(self, run_dir: Path, console: Console) -> None:
        """`console` gets a line for every chunk that has come."""
        self._run_dir, self._console = run_dir, console
        self._shown: dict[str, str] = {}
        self._started = time.time()
        self._ticks = 0

    def update(self) -> None:
        """Print what has changed since the last call, and the live line."""
        phase = "starting"
        for status in read_status(self._run_dir):
            if status.role == "evaluation":
                phase = status.phase
                for name, counts in status.fields.get("sets", {}).items():
                    self._show(name, counts)
        self._ticks += 1
        spinner = _SPINNER[self._ticks % len(_SPINNER)]
        spent = format_duration(time.time() - self._started)
        self._console.transient(f"{spinner} {phase} {spent}")

    def _show(self, name: str, counts: dict[str, float]) -> None:
        """One line, the first time with what earlier starts left."""
        scored, failed = int(counts["scored"]), int(counts["failed"])
        line = f"{name}: {scored} of {int(counts['wanted'])} episodes"
        if scored:
            line += f", mean accuracy {100 * counts['accuracy_sum'] / scored:.2f}"
        if failed:
            line += f", {failed} failed outside the model"
        if self._shown.get(name) != line and (scored or failed):
            self._console.line(line)
        self._shown[name] = line
