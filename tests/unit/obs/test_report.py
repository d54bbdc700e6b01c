"""The recorder's lines and the report made of them: complete, small, and safe to open.

The page's script runs only where a chromium is installed; elsewhere its input is checked.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_matpo.config.load import dump_config
from megatron_matpo.config.root import Config
from megatron_matpo.config.run import RunConfig
from megatron_matpo.config.train import ModelConfig, ParallelConfig
from megatron_matpo.obs import conversations
from megatron_matpo.obs.metrics import REQUIRED
from megatron_matpo.obs.metrics_log import FILE_NAME, MetricsWriter
from megatron_matpo.obs.recorder import write_rollouts_jsonl
from megatron_matpo.obs.report import MAX_POINTS, build_report, script_json
from megatron_matpo.types import (
    CallRecord,
    Episode,
    Group,
    Reward,
    Role,
    RolloutBatch,
    Status,
    Trajectory,
    Turn,
    TurnKind,
    VersionSpan,
)

EVIL = '</script><script>document.title="HACKED"</script><img src=x onerror=alert(1)><!-- \u2028'


def trajectory(identity: str, role: Role, parent: str = "", text: str = "answer") -> Trajectory:
    turns = (
        Turn(TurnKind.PROMPT, (1, 2), "system and question"),
        Turn(TurnKind.MODEL, (3,), f"call {identity}", (-0.5,), (VersionSpan(4, 1),)),
        Turn(TurnKind.ENVIRONMENT, (4, 5), "tool reply"),
        Turn(TurnKind.MODEL, (6, 7), text, (-0.1, -0.2), (VersionSpan(4, 1), VersionSpan(5, 1))),
    )
    calls = (CallRecord(1, "browsing_agent", "search_and_browse", "ok", "w", 0.25),)
    return Trajectory(
        id=identity,
        role=role,
        agent="main_agent" if role is Role.PLANNER else "browsing_agent",
        parent_id=parent,
        spawn_turn=0 if role is Role.PLANNER else 1,
        turns=turns,
        status=Status.ANSWERED,
        format_score=0.5,
        calls=calls,
        subtask="" if role is Role.PLANNER else "find it",
    )


def episode(identity: str, total: float | None, text: str = "answer", workers: int = 1) -> Episode:
    spawned = tuple(trajectory(f"{identity}w{k}", Role.WORKER, identity) for k in range(workers))
    return Episode(
        id=identity,
        uid="u",
        sample_index=0,
        planner=trajectory(identity, Role.PLANNER, text=text),
        workers=spawned,
        reward=None if total is None else Reward(1.0, 0.5, total),
        answer="a",
        failure="judge is down" if total is None else "",
    )


def batch(step: int, *episodes: Episode) -> RolloutBatch:
    return RolloutBatch(step, step, (Group("u", "world", "why?", "truth", 3, episodes),))


def write_run(run_dir: Path, num_steps: int = 3, *episodes: Episode) -> None:
    writer = MetricsWriter(run_dir)
    for step in range(1, num_steps + 1):
        values = {name: 1.0 for name in REQUIRED if name != "step"}
        writer.write(step, values | {"mismatch/max": math.nan})
    for step in range(1, num_steps + 1):
        path = run_dir / f"rollouts/step_{step:06d}.jsonl"
        write_rollouts_jsonl(path, batch(step, *(episodes or (episode("e", 1.0),))), {"e": 0.5})


class Page(HTMLParser):
    """Elements of a page, its data block, and everything that would load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self.title = ""
        self._inside = ""
        self.feed(text)
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        if self._inside == "title":
            self.title += data


def read_page(run_dir: Path) -> Page:
    return Page(build_report(run_dir).read_text(encoding="utf-8"))


def test_recorded_lines_have_matpos_fields_and_ours(tmp_path: Path) -> None:
    path = tmp_path / "rollouts/step_000007.jsonl"
    write_rollouts_jsonl(path, batch(7, episode("e", 0.95), episode("f", None)), {"e": -1.5})
    planner, worker, failed, _ = (json.loads(line) for line in path.read_text().splitlines())
    assert {name: planner[name] for name in list(planner)[:8]} == {
        "input": "system and question",
        "ground_truth": "truth",
        "output": "call etool replyanswer",
        "score": 0.95,
        "step": 7,
        "tool_format_reward": 0.5,
        "accuracy_reward": 1.0,
        "combined_reward": 0.95,
    }
    assert planner["advantage"] == worker["advantage"] == -1.5
    assert (worker["role"], worker["parent_id"], worker["spawn_turn"]) == ("worker", "e", 1)
    assert worker["policy_versions"] == [4, 5]
    assert worker["turns"][3] == {"kind": "model", "text": "answer", "num_tokens": 2}
    assert worker["calls"][0]["outcome"] == "ok"
    assert (failed["score"], failed["advantage"]) == (None, None)
    assert failed["failure"] == "judge is down"


def test_a_line_separator_or_half_a_pair_in_a_text_breaks_no_line(tmp_path: Path) -> None:
    path = tmp_path / "step_1.jsonl"
    write_rollouts_jsonl(path, batch(1, episode("e", 1.0, "a\u2028b\nc \ud83d", 0)), {})
    (line,) = path.read_bytes().decode().split("\n")[:-1]
    assert json.loads(line)["turns"][3]["text"] == "a\u2028b\nc ?"


def test_the_page_is_self_contained_and_holds_the_run(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    config = Config(
        run=RunConfig(name="tiny-run", steps=9),
        model=ModelConfig(path="/a/b/tiny"),
        parallel=ParallelConfig(tensor=2, data=4),
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    page = read_page(tmp_path)
    assert page.loads == []
    assert page.title == "tiny-run - megatron_matpo"
    assert page.data["planned_steps"] == 9
    shown_config = dict(page.data["config"])
    assert shown_config["model"] == "tiny"
    assert (shown_config["device"], shown_config["trainer"]) == ("CPU", "TP2 x DP4")
    assert shown_config["learning rate"] == "1e-05"
    assert page.data["series"]["step"] == [1, 2, 3]
    assert page.data["series"]["mismatch/max"] == [None, None, None]
    assert page.data["totals"]["sampled"] == 3.0
    steps = page.data["conversations"]["steps"]
    assert [step["step"] for step in steps] == [1, 2, 3]
    (shown,) = steps[0]["episodes"]
    texts = page.data["conversations"]["texts"]
    assert (shown["advantage"], shown["workers"][0]["spawn_turn"]) == (0.5, 1)
    assert texts[shown["workers"][0]["subtask"]] == "find it"
    assert [turn[0] for turn in shown["planner"]["turns"]] == [
        "prompt",
        "model",
        "environment",
        "model",
    ]
    assert texts.count("system and question") == 1, "equal texts are stored once"


def test_untrusted_text_cannot_leave_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "{{data}} <img src=x>"
    write_run(folder, 1, episode("e", 1.0, EVIL))
    page = read_page(folder)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert EVIL in page.data["conversations"]["texts"]
    assert page.title.startswith("{{data}} <img src=x>")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page.scripts[1]
    )
    assert json.loads(script_json(EVIL)) == EVIL
    assert not set("<>&\u2028\u2029") & set(script_json(EVIL))


@pytest.mark.parametrize("num_steps", [0, 1])
def test_an_empty_or_short_run_has_a_page(tmp_path: Path, num_steps: int) -> None:
    if num_steps:
        write_run(tmp_path, num_steps)
    page = read_page(tmp_path)
    assert len(page.data["series"].get("step", [])) == num_steps
    assert page.title == f"{tmp_path.name} - megatron_matpo"


def test_damaged_files_leave_out_their_part(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    (tmp_path / "config.yaml").write_text("run: [\n")
    path = tmp_path / "rollouts/step_000002.jsonl"
    path.write_text(path.read_text()[:-40] + '\n[1]\n{"role": "planner"}\n' + path.read_text()[:9])
    (tmp_path / "rollouts/step_000003.jsonl").write_text('{"episode_id": "x", "role": "worker"}\n')
    page = read_page(tmp_path)
    assert [step["step"] for step in page.data["conversations"]["steps"]] == [1, 2]


def test_a_large_run_stays_small(tmp_path: Path) -> None:
    episodes = [episode(f"e{i:03d}", i / 100, f"<&> {i} " * 8000, 2) for i in range(60)]
    values = dict.fromkeys(REQUIRED, 1.0)
    lines = (json.dumps(values | {"step": step}) for step in range(1, 2 * MAX_POINTS + 1))
    (tmp_path / FILE_NAME).write_text("".join(line + "\n" for line in lines))
    write_rollouts_jsonl(tmp_path / "first.jsonl", batch(300, *episodes), {})
    (tmp_path / "rollouts").mkdir()
    for step in range(300, 2 * MAX_POINTS + 1, 300):
        (tmp_path / f"rollouts/step_{step:06d}.jsonl").symlink_to(tmp_path / "first.jsonl")
    path = build_report(tmp_path)
    assert path.stat().st_size < 5_000_000
    page = Page(path.read_text(encoding="utf-8"))
    steps = page.data["series"]["step"]
    assert (len(steps), steps[0], steps[-1]) == (MAX_POINTS, 1, 2 * MAX_POINTS)
    shown = page.data["conversations"]["steps"]
    assert len(shown) == conversations.MAX_STEPS
    assert (shown[0]["step"], shown[-1]["step"]) == (300, 3000)
    totals = [item["total"] for item in shown[0]["episodes"]]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == 0.59, "the best one is there"
    assert any("characters are not shown" in text for text in page.data["conversations"]["texts"])


def test_the_best_the_worst_and_the_failed_are_shown(tmp_path: Path) -> None:
    episodes = [episode(f"e{i:03d}", float(i), workers=0) for i in range(50)]
    write_run(tmp_path, 1, *episodes, episode("lost", None))
    (step,) = read_page(tmp_path).data["conversations"]["steps"]
    assert (step["num_episodes"], len(step["episodes"])) == (51, 24)
    assert step["episodes"][0]["total"] == 49.0
    assert step["episodes"][-1]["total"] is None


def test_the_page_works_in_a_browser(tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium here")
    write_run(tmp_path, 5, episode("e", 1.0, EVIL), episode("f", None))
    command = [
        *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
        build_report(tmp_path).as_uri(),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=40)
    except subprocess.TimeoutExpired:
        pytest.skip("chromium does not run here")
    if "<body" not in done.stdout:
        pytest.skip(f"chromium does not run here: {done.stderr[-200:]}")
    assert "HACKED" not in done.stdout.split("</title>")[0]
    assert done.stdout.count('class="chart"') >= 5
    assert done.stdout.count('class="turn model"') == 4, "two of the planner, two of its worker"
    assert "<img" not in done.stdout.split("<script")[0]
