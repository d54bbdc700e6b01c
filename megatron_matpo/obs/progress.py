"""The live line of a run, as pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_EVALUATION = re.compile(r"eval/([^/]+)/(mean@\d+)")


def format_duration(seconds: float) -> str:
    """`0:07`, `2:10`, `1:02:03`, `3d 04:05` (rounded to whole seconds)."""
    total = max(0, round(seconds))
    days, rest = divmod(total, 86_400)
    hours, rest = divmod(rest, 3_600)
    minutes, secs = divmod(rest, 60)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def eta_s(step: int, num_steps: int, step_times_s: Sequence[float], window: int = 10) -> float:
    """Seconds left after `step`, from the mean of the last `window` step times (0 without any)."""
    recent = step_times_s[-window:]
    return max(0, num_steps - step) * sum(recent) / len(recent) if recent else 0.0


def format_progress(
    step: int, num_steps: int, metrics: Mapping[str, float | None], eta: float | None = None
) -> str:
    """One line for a finished step; parts whose metrics are missing or null are left out.

    `eta` is in seconds. Tokens per second are sampled tokens over the wall clock of the whole step.
    """

    def has(name: str) -> bool:
        return metrics.get(name) is not None

    def number(name: str, form: str) -> str:
        return format(float(metrics[name] or 0.0), form)

    parts = [f"step {step}/{num_steps}"]
    phases = ("rollout", "score", "train", "sync")
    times = [
        f"{phase} {number(f'time/{phase}_s', '.1f')}s"
        for phase in phases
        if has(f"time/{phase}_s") and float(metrics[f"time/{phase}_s"] or 0.0) >= 0.05
    ]
    rewards = [
        f"{label} {number(name, '.2f')}"
        for label, name in (("reward", "reward/total"), ("acc", "reward/accuracy"))
        if has(name)
    ]
    parts += [" ".join(group) for group in (times, rewards) if group]
    seconds = metrics.get("time/step_s")
    if seconds and has("tokens/sampled"):
        parts.append(f"{float(metrics['tokens/sampled'] or 0.0) / seconds:.0f} tok/s")
    if has("mismatch/abs_logprob"):
        parts.append(f"mismatch {_short(float(metrics['mismatch/abs_logprob'] or 0.0))}")
    parts += [
        f"{match[1]} {match[2]} {number(name, '.2f')}"
        for name in metrics
        if (match := _EVALUATION.fullmatch(name)) and has(name)
    ]
    if eta is not None:
        parts.append(f"ETA {format_duration(eta)}")
    return " | ".join(parts)


def format_why(why: str) -> str:
    """The line below a step's progress that says why it was slow (`obs.why`)."""
    return f"  slow: {why}"


def _short(value: float) -> str:
    """`3e-7`, without the zero that `format` puts into small exponents; `0.012` from 1e-3 up."""
    if value == 0.0 or value >= 1e-3:
        return f"{value:.2g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"
