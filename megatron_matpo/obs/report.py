"""`RUN/report.html`: one self-contained page with the curves of a run and its conversations.

The page loads nothing from anywhere. What a model or a tool wrote is untrusted: it travels as JSON
in which no character can end the script element, and the page only ever inserts it as text.
"""

from __future__ import annotations

import html
import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_matpo.obs.conversations import read_conversations
from megatron_matpo.obs.files import write_atomic
from megatron_matpo.obs.metrics import read_metrics

FILE_NAME = "report.html"
PAGE = Path(__file__).with_name("page")
SCRIPTS = ("base.js", "charts.js", "conversations.js", "main.js")
MAX_POINTS = 1500
"""Longer runs are thinned out; the first and the last step stay."""

_CHARTED_PREFIXES = ("reward/", "mismatch/", "time/", "eval/", "tokens/", "rollout/workers")
_CHARTED_NAMES = frozenset({"policy/entropy", "optim/grad_norm", "optim/lr", "policy/clip_frac"})
_SHOWN_CONFIG = (
    ("model", "model.path"),
    ("device", "cluster.gpus_per_node"),
    ("nodes", "cluster.num_nodes"),
    ("precision", "precision"),
    ("trainer", "parallel"),
    ("engines", "rollout.num_servers"),
    ("prompts per step", "data.prompts_per_step"),
    ("samples per prompt", "data.samples_per_prompt"),
    ("updates per step", "algo.updates_per_step"),
    ("learning rate", "optim.lr"),
    ("staleness bound", "rollout.max_staleness"),
    ("weight transport", "weight_sync.transport"),
    ("seed", "run.seed"),
)


def build_report(run_dir: str | Path) -> Path:
    """Write `RUN/report.html` (less than 5 MB) from what the run has recorded so far.

    Files that are missing or cut short leave out their part of the page.

    Raises:
        OSError: the page cannot be written.
    """
    folder = Path(run_dir)
    config = _read_config(folder / "config.yaml")
    lines = read_metrics(folder)
    data = {
        "run": str(_lookup(config, "run.name") or folder.absolute().name),
        "planned_steps": _lookup(config, "run.steps"),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "config": list(_shown_config(config)),
        "series": _series(lines),
        "totals": _totals(lines),
        "conversations": read_conversations(folder / "rollouts"),
    }
    parts = {
        "title": html.escape(data["run"]),
        "style": _page_file("style.css"),
        "script": "\n".join(map(_page_file, SCRIPTS)),
        "data": script_json(data),
    }
    # One pass: a name of a part that occurs in another part, or in the data, stays what it is.
    page = re.sub(r"{{(\w+)}}", lambda match: parts[match.group(1)], _page_file("page.html"))
    path = folder / FILE_NAME
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


def script_json(value: object) -> str:
    """JSON that is safe inside a script element: no `<`, `>`, `&` and no JavaScript line breaks."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _page_file(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _lookup(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _shown_config(config: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for label, dotted in _SHOWN_CONFIG:
        value = _lookup(config, dotted)
        if value is None or value == "" or isinstance(value, Mapping) != (dotted == "parallel"):
            continue
        if dotted == "cluster.gpus_per_node":
            value = f"{value} GPUs per node" if value else "CPU"
        elif dotted == "parallel":
            value = " x ".join(f"{name[0].upper()}P{size}" for name, size in value.items())
        elif dotted == "model.path":
            value = Path(str(value)).name or value
        yield label, str(value)


def _series(lines: Sequence[Mapping[str, float | None]]) -> dict[str, list[float | None]]:
    chosen = _thin(lines)
    names = sorted(
        {
            name
            for line in chosen
            for name in line
            if name in _CHARTED_NAMES or name.startswith(_CHARTED_PREFIXES)
        }
    )
    series = {name: [_rounded(line.get(name)) for line in chosen] for name in names}
    return {"step": [line["step"] for line in chosen]} | series


def _thin(lines: Sequence[Mapping[str, float | None]]) -> list[Mapping[str, float | None]]:
    if len(lines) <= MAX_POINTS:
        return list(lines)
    stride = (len(lines) - 1) / (MAX_POINTS - 1)
    return [lines[round(index * stride)] for index in range(MAX_POINTS)]


def _rounded(value: float | None) -> float | None:
    """Six digits are more than a pixel, and a third of the size."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _totals(lines: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Sums over all lines, also those that `_thin` leaves out."""

    def total(name: str) -> float:
        return sum(line.get(name) or 0.0 for line in lines)

    return {
        "step_s": total("time/step_s"),
        "sampled": total("tokens/sampled"),
        "trained": total("tokens/trained"),
        "updates": total("optim/updates"),
    }
