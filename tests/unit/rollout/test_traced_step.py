"""Proves that the spans of a played step agree with its records and metrics, and hold no text."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_matpo.config.reward import JudgeConfig, RewardConfig
from megatron_matpo.errors import EngineUnreachable, ToolError
from megatron_matpo.obs.span_files import FOLDER, StoredSpan, read_spans, traced_steps
from megatron_matpo.obs.spans import Span, recording
from megatron_matpo.obs.trace_export import export_trace
from megatron_matpo.rewards.judge import Judge
from megatron_matpo.rollout import scheduler
from megatron_matpo.rollout.collect import RolloutManager
from megatron_matpo.rollout.fleet import Fleet
from megatron_matpo.rollout.routing import Router
from megatron_matpo.types import RolloutBatch, RowAsk
from tests.helpers.fake_judge import KEY, FakeJudge
from tests.helpers.play import by_role, play
from tests.helpers.rollouts import (
    FakeEngine,
    FakeToolBox,
    Script,
    delegate,
    make_chat,
    make_config,
    make_question,
    search,
)
from tests.helpers.trace import check_trace

SECRET = "sk-planted-in-every-text"
QUESTIONS = {"train": [make_question(f"{SECRET} {i}?") for i in range(5)]}
TIMEOUT_S = 10.0


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "RETRY_PAUSE_S", 0.0)


def turns(conversation: str, turn: int, text: str) -> str:
    """Two workers side by side, of two searches side by side each; then an answer."""
    if conversation.endswith(".p"):
        both = delegate(f"find {SECRET}") + "\n" + delegate("and that")
        return [both, f"{SECRET}: \\boxed{{Ada}}"][turn]
    return [search(f"a {SECRET}") + search("b"), f"Ada {SECRET}."][turn]


def complete_spans(folder: Path, step: int) -> list[StoredSpan]:
    """Of the manager, when its file is complete: all score spans are written."""
    end_s = time.monotonic() + TIMEOUT_S
    while True:
        found = [span for file in read_spans(folder, step) for span in file.spans]
        if sum(span.name == "score" for span in found) == 4:
            return found
        assert time.monotonic() < end_s, "the writer is a moment behind"
        time.sleep(0.01)


def collect(
    folder: Path,
    script: Script = turns,
    tools: FakeToolBox | None = None,
    judge: Judge | None = None,
    asks: list[RowAsk] | None = None,
    wrap: Callable[[Any], Any] = lambda engine: engine,
    **rollout: Any,
) -> tuple[RolloutBatch, Path]:
    """One step of 2 x 2 episodes, traced."""
    config = make_config(str(folder), **rollout)
    config = replace(config, obs=replace(config.obs, trace_every=1))
    if judge is not None:
        config = replace(config, reward=RewardConfig(grader="judge"))
    engine = FakeEngine(script, delay_s=0.002)
    manager = RolloutManager(
        config,
        lambda version: wrap(engine),
        tools or FakeToolBox(delays_s={"b": 0.01}),
        make_chat(),
        QUESTIONS,
        judge,
    )
    return asyncio.run(manager.collect(1, 0, asks=asks)), Path(config.run_dir)


def seconds(spans: list[StoredSpan], name: str) -> float:
    return sum(span.end_us - span.start_us for span in spans if span.name == name) / 1e6


def test_sums_agree_with_the_records_and_the_metrics(tmp_path: Path) -> None:
    batch, run_dir = collect(tmp_path)
    spans = complete_spans(run_dir, 1)
    episodes = [episode for group in batch.groups for episode in group.episodes]
    calls = [call for e in episodes for item in e.trajectories for call in item.calls]
    of_workers = [call.duration_s for call in calls if call.worker_id]
    of_tools = [call.duration_s for call in calls if not call.worker_id]
    assert (len(of_workers), len(of_tools)) == (8, 16)
    slack = 1e-6 * len(spans)  # of rounding to microseconds
    assert seconds(spans, "search") == pytest.approx(sum(of_tools), abs=slack)
    assert seconds(spans, "browser") == pytest.approx(sum(of_workers), abs=slack)
    durations = [episode.duration_s for episode in episodes]
    assert seconds(spans, "episode") == pytest.approx(sum(durations), abs=slack)
    assert batch.metrics["rollout/episode_s_max"] == max(durations)
    assert seconds(spans, "score") == pytest.approx(sum(e.score_s for e in episodes), abs=slack)
    assert batch.metrics["tools/latency_s_mean"] == pytest.approx(sum(of_tools) / 16, abs=2e-3)
    assert max(durations) <= batch.metrics["time/collect_s"]
    samples = [span for span in spans if span.name.startswith("turn ")]
    tokens = sum(span.notes["tokens"] for span in samples)
    assert tokens == batch.metrics["tokens/sampled"]
    assert len(samples) == sum(item.num_model_turns for e in episodes for item in e.trajectories)
    assert {(e.id, "") for e in episodes} == {(s.unit, s.row) for s in spans if s.name == "episode"}


def test_spans_are_inside_their_episode_and_worker(tmp_path: Path) -> None:
    _, run_dir = collect(tmp_path)
    spans = complete_spans(run_dir, 1)
    for outer_name, inner_names in (
        ("episode", {"turn 1", "turn 2", "browser", "search"}),
        ("browser", {"turn 1", "turn 2", "search"}),
    ):
        for outer in (span for span in spans if span.name == outer_name):
            rows = {outer.row} if outer_name == "browser" else {"", "w0", "w1"}
            inner = [s for s in spans if s.unit == outer.unit and s.row in rows]
            inside = [s for s in inner if s.name in inner_names]
            assert inside
            for span in inside:
                assert outer.start_us <= span.start_us <= span.end_us <= outer.end_us


def test_no_two_spans_of_a_track_cut_each_other(tmp_path: Path) -> None:
    _, run_dir = collect(tmp_path, max_concurrent_episodes=2)
    complete_spans(run_dir, 1)
    tracks = check_trace(json.loads(export_trace(run_dir, 1).read_text()))
    names = {track for process, track in tracks.values() if process == "episodes"}
    assert {"slot 0", "slot 1", "slot 0 w0", "slot 0 w1", "slot 0 w1 call 2"} <= names
    assert "slot 2" not in names, "two places at a time"


def test_waits_for_slots_and_retries_are_spans(tmp_path: Path) -> None:
    failed: list[str] = []

    def script(conversation: str, turn: int, text: str) -> str | BaseException:
        if conversation.endswith("0.0.p") and not failed:
            failed.append(conversation)
            return EngineUnreachable("gone")
        return turns(conversation, turn, text)

    batch, run_dir = collect(tmp_path, script, max_concurrent_episodes=1)
    spans = complete_spans(run_dir, 1)
    waits = [span for span in spans if span.name == "wait for a slot"]
    assert len(waits) == 3
    late = max(e.start_s for group in batch.groups for e in group.episodes)
    longest = max(span.end_us - span.start_us for span in waits) / 1e6
    assert late == pytest.approx(longest, abs=0.05)
    (pause,) = [span for span in spans if span.name == "pause before a retry"]
    assert pause.notes == {"after": "engine_failure"}
    notes = {s.unit: s.notes for s in spans if s.name == "episode"}[pause.unit]
    assert notes == {"status": "answered", "retries": 1}
    (broken,) = [span for span in spans if "failed" in span.notes]
    assert (broken.name, broken.notes["failed"]) == ("turn 1", "EngineUnreachable")


def test_turns_name_the_engine_and_how_many_were_tried(tmp_path: Path) -> None:
    class Engine:
        def __init__(self, inner: FakeEngine, number: int) -> None:
            self.url, self._inner, self._number = f"http://engine-{number}", inner, number
            self._conversations: dict[int, str] = {}

        async def generate(self, ids: Any, params: int) -> Any:
            if self._number == 0:
                raise EngineUnreachable(f"{self.url} is gone: {SECRET}")
            text = self._inner.tokenizer.decode(ids)
            turn = text.count("<|im_start|>assistant") - 1
            who = ".p" if "You plan." in text else ".w"
            return await self._inner.sample(ids, params, f"{id(ids)}{who}@{turn}")

    def by_text(conversation: str, turn: int, text: str) -> str:
        who, _, number = conversation.partition("@")
        return turns(who, int(number), text)

    def wrap(engine: FakeEngine) -> Any:
        engine.script = by_text
        fleet = Fleet.unwatched(["a", "b"])
        engines = [Engine(engine, 0), Engine(engine, 1)]
        return Router(engines, lambda n: n, fleet=fleet).sampler(0)

    batch, run_dir = collect(tmp_path, wrap=wrap, prompts="dataset")
    assert batch.metrics["rollout/failed"] == 0
    samples = [s for s in complete_spans(run_dir, 1) if s.name.startswith("turn ")]
    assert {span.notes["engine"] for span in samples} == {1}
    assert {span.notes["engines_tried"] for span in samples} >= {1}
    assert SECRET not in all_text(run_dir)


def test_the_judge_has_spans_and_its_key_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)

    async def run() -> RolloutBatch:
        async with FakeJudge(["http_500", "A", "A", "A", "A"]) as fake:
            config = JudgeConfig(
                base_url=fake.base_url,
                model="m",
                api_key_env="JUDGE_KEY",
                backoff_s=0.0,
                max_concurrency=1,
            )
            async with Judge(config) as judge:
                base = make_config(str(tmp_path))
                config = replace(
                    base,
                    obs=replace(base.obs, trace_every=1),
                    reward=RewardConfig(grader="judge", judge=config),
                )
                manager = RolloutManager(
                    config,
                    lambda version: FakeEngine(turns),
                    FakeToolBox(),
                    make_chat(),
                    QUESTIONS,
                    judge,
                )
                return await manager.collect(1, 0)

    batch = asyncio.run(run())
    spans = complete_spans(tmp_path / "test", 1)
    assert sum(span.name == "judge" for span in spans) == 5 == batch.metrics["judge/calls"]
    mean_s = seconds(spans, "judge") / 5
    assert batch.metrics["judge/latency_s_mean"] == pytest.approx(mean_s, abs=1e-5)
    assert any(span.name == "wait for a place at the judge" for span in spans)
    export_trace(tmp_path / "test", 1)
    assert KEY not in all_text(tmp_path / "test")


def all_text(run_dir: Path) -> str:
    return "".join(path.read_text() for path in (run_dir / "trace").rglob("*.json*"))


@pytest.mark.parametrize("is_failing", [False, True])
def test_no_text_of_prompts_calls_replies_or_errors_is_in_a_span(
    tmp_path: Path, is_failing: bool
) -> None:
    failure = ToolError(f"the key {SECRET} is refused") if is_failing else None
    batch, run_dir = collect(tmp_path, tools=FakeToolBox(failure=failure), max_failed_frac=1.0)
    complete_spans(run_dir, 1)
    export_trace(run_dir, 1)
    assert SECRET in str(batch), "it was planted"
    text = all_text(run_dir)
    assert "search" in text and SECRET not in text and "boxed" not in text


def test_parts_of_an_evaluation_and_untraced_steps_leave_no_file(tmp_path: Path) -> None:
    _, run_dir = collect(tmp_path, asks=[RowAsk(0, 1)])
    assert traced_steps(run_dir) == []
    config = make_config(str(tmp_path))
    engine = FakeEngine(turns)
    manager = RolloutManager(config, lambda _: engine, FakeToolBox(), make_chat(), QUESTIONS)
    asyncio.run(manager.collect(1, 0))
    assert not (run_dir / FOLDER).exists()


def test_a_played_episode_has_a_row_for_the_planner_and_each_worker() -> None:
    class Kept:
        def __init__(self) -> None:
            self.spans: list[Span] = []

        def add(self, span: Span) -> None:
            self.spans.append(span)

    kept = Kept()
    planner = [delegate("find it"), "It is \\boxed{Ada}"]
    with recording(kept, ("e0", "")):
        tree, _, _ = play(by_role(planner, [search("it"), "Ada."]), delay_s=0.001)
    assert [(item.name, item.track[1]) for item in kept.spans] == [
        ("turn 1", ""),
        ("turn 1", "w0"),
        ("search", "w0"),
        ("turn 2", "w0"),
        ("browser", "w0"),
        ("turn 2", ""),
    ]
    (record,) = tree.planner.calls
    browser = kept.spans[4]
    assert record.duration_s == browser.end_s - browser.start_s
