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
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_matpo.config.load import load_resolved
from megatron_matpo.config.root import Config
from megatron_matpo.errors import ConfigError
from megatron_matpo.obs.conversations import read_conversations
from megatron_matpo.obs.files import write_atomic
from megatron_matpo.obs.metrics_log import read_metrics

FILE_NAME = "report.html"
PAGE = Path(__file__).with_name("page")
SCRIPTS = ("base.js", "charts.js", "conversations.js", "main.js")
MAX_POINTS = 1500
"""Longer runs are thinned out; the first and the last step stay."""

_CHARTED_PREFIXES = ("reward/", "mismatch/", "time/", "tokens/", "rollout/workers")
_CHARTED_EVALUATIONS = re.compile(r"eval/[^/]+/(mean|best|maj)@\d+")
_CHARTED_NAMES = frozenset({"policy/entropy", "optim/grad_norm", "loss/sft"})


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
        "run": config.run.name if config else folder.absolute().name,
        "planned_steps": config.run.steps if config else None,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "config": _shown_config(config) if config else [],
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


def _read_config(path: Path) -> Config | None:
    try:
        return load_resolved(str(path))
    except (ConfigError, OSError):
        return None  # the curves are worth a page without the settings


def _shown_config(config: Config) -> list[tuple[str, str]]:
    cluster, parallel = config.cluster, config.parallel
    device = f"{cluster.gpus_per_node} GPUs per node" if cluster.gpus_per_node else "CPU"
    sizes = {
        "TP": parallel.tensor,
        "PP": parallel.pipeline,
        "VPP": parallel.virtual,
        "CP": parallel.context,
        "EP": parallel.expert,
        "DP": parallel.data,
    }
    shown: dict[str, object] = {
        "model": Path(config.model.path).name,
        "device": device if cluster.num_nodes == 1 else f"{cluster.num_nodes} nodes, {device}",
        "precision": config.precision,
        "trainer": " x ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)
        or "1 rank",
        "engines": config.rollout.num_servers,
        "prompts per step": config.data.prompts_per_step,
        "samples per prompt": config.data.samples_per_prompt,
        "updates per step": config.algo.updates_per_step,
        "learning rate": f"{config.optim.lr:g}",
        "staleness bound": config.rollout.max_staleness,
        "seed": config.run.seed,
    }
    return [(name, str(value)) for name, value in shown.items() if value != ""]


def _series(lines: Sequence[Mapping[str, float | None]]) -> dict[str, list[float | None]]:
    chosen = _thin(lines)
    names = sorted(
        {
            name
            for line in chosen
            for name in line
            if name in _CHARTED_NAMES
            or name.startswith(_CHARTED_PREFIXES)
            or _CHARTED_EVALUATIONS.fullmatch(name)
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
