"""`matpo status`, `matpo report` and `matpo trace`: a run seen from outside."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_matpo.errors import ConfigError
from megatron_matpo.launch.run_folder import CONFIG_FILE, is_in_use, previous_command
from megatron_matpo.launch.slurm_state import has_job, slurm_lines
from megatron_matpo.obs.failure import first_failure
from megatron_matpo.obs.metrics_log import read_metrics, read_why
from megatron_matpo.obs.progress import format_duration, format_progress, format_why
from megatron_matpo.obs.status import read_status


def report(run_dir: str) -> Path:
    """Write `report.html` of a run and return its path.

    Raises:
        ConfigError: `run_dir` is not a run folder.
    """
    folder = _run_folder(run_dir)
    from megatron_matpo.obs.report import build_report

    return Path(build_report(folder))


def trace(run_dir: str, step: int | None) -> Path:
    """Write the trace of a step (None: the newest that has one) and return its path.

    Raises:
        ConfigError: `run_dir` is not a run folder, or there are no spans of that step.
    """
    from megatron_matpo.obs.trace_export import export_trace

    return export_trace(_run_folder(run_dir), step)


def status_text(run_dir: str) -> str:
    """What each process of a run does, its last step, and its first failure, as lines.

    Raises:
        ConfigError: `run_dir` is not a run folder.
    """
    folder = Path(run_dir)
    if not has_job(folder):  # one that waits has not opened its folder yet
        folder = _run_folder(run_dir)
    now = time.time()
    lines = [f"{run_dir}: {'running' if is_in_use(folder) else 'not running'}"]
    lines += slurm_lines(folder)
    for status in read_status(folder):
        step = f" step {status.step}" if status.step >= 0 else ""
        since = format_duration(now - status.updated_at)
        lines.append(f"  {status.role}-{status.rank}:{step} {status.phase} since {since}")
    metrics = read_metrics(folder)
    if metrics:
        from megatron_matpo.config.load import load_resolved

        config = load_resolved(str(folder / CONFIG_FILE))
        is_sft = previous_command(folder) == "sft"
        num_steps = config.sft.steps if is_sft else config.run.steps
        last = metrics[-1]
        step = int(last["step"] or 0)
        lines.append("  " + format_progress(step, num_steps, last))
        if why := read_why(folder).get(step):
            lines.append("  " + format_why(why))
    failure = first_failure(folder)
    if failure is not None:
        where = f"{failure.role}-{failure.rank}, phase {failure.phase}"
        lines.append(f"  first failure: {where}: {failure.type}: {failure.message}")
    return "\n".join(lines)


def _run_folder(run_dir: str) -> Path:
    folder = Path(run_dir)
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{run_dir}: not a run folder (it has no {CONFIG_FILE})")
    return folder
