"""Proves that spans nest and are measured once, and that their files and the trace are whole.

Real files and threads. Not proven here: what Perfetto draws; the format is its documented input.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_matpo.errors import ConfigError
from megatron_matpo.obs import span_files, spans
from megatron_matpo.obs.span_files import SpanFile, StoredSpan, read_spans, traced_steps
from megatron_matpo.obs.spans import Span, note, place, recording, span
from megatron_matpo.obs.step_spans import StepSpans
from megatron_matpo.obs.trace_export import export_trace, lanes, trace_events
from tests.helpers.trace import check_trace, overlaps

TIMEOUT_S = 10.0


class Kept:
    """A sink that keeps spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def add(self, span: Span) -> None:
        self.spans.append(span)


def stored(start_us: int, end_us: int, name: str = "x", unit: str = "e", row: str = "") -> Any:
    return StoredSpan(name, unit, row, start_us, end_us, {})


def write(folder: Path, role: str, step: int, attempt: float, items: list[Span]) -> Path:
    file = SpanFile(folder, role, step, attempt)
    for item in items:
        file.add(item)
    file.end()
    file.wait(TIMEOUT_S)
    return file.path


def test_a_span_measures_also_where_nobody_records() -> None:
    with span("work") as work:
        time.sleep(0.01)
        note(ignored=1)
    assert work.seconds >= 0.01


def test_spans_nest_and_notes_go_to_the_innermost_one() -> None:
    kept = Kept()
    with recording(kept, ("e", "")), span("outer", server="a"):
        note(before=1)
        with span("inner", ("e", "w0")):
            note(within=2)
            with span("leaf"):
                pass
        note(after=3)
    leaf, inner, outer = kept.spans
    assert outer.notes == {"server": "a", "before": 1, "after": 3}
    assert inner.notes == {"within": 2}
    assert [item.track for item in kept.spans] == [("e", "w0"), ("e", "w0"), ("e", "")]
    assert outer.start_s <= inner.start_s <= leaf.start_s <= leaf.end_s <= inner.end_s
    assert inner.end_s <= outer.end_s
    with span("later"):
        pass
    assert len(kept.spans) == 3


def test_tasks_inherit_the_recording_and_do_not_mix_their_spans() -> None:
    kept = Kept()

    async def work(name: str) -> None:
        with span(name, (name, "")):
            await asyncio.sleep(0.001)
            with span("child"):
                await asyncio.sleep(0.001)
                note(of=name)

    async def main() -> None:
        with recording(kept):
            await asyncio.gather(*(work(name) for name in "abc"))

    asyncio.run(main())
    children = [item for item in kept.spans if item.name == "child"]
    assert sorted((item.track[0], item.notes["of"]) for item in children) == [
        ("a", "a"),
        ("b", "b"),
        ("c", "c"),
    ]


def test_what_a_block_raises_is_noted_by_class_alone() -> None:
    kept = Kept()
    with recording(kept), pytest.raises(ValueError), span("call"):
        raise ValueError("sk-secret")
    assert kept.spans[0].notes == {"failed": "ValueError"}


def test_a_place_has_a_span_only_if_it_was_waited_for() -> None:
    kept = Kept()

    async def main() -> None:
        gate = asyncio.Semaphore(1)

        async def work() -> None:
            async with place(gate, "wait", ("e", "queue")):
                await asyncio.sleep(0.01)

        with recording(kept):
            await asyncio.gather(work(), work())
        assert not gate.locked()

    asyncio.run(main())
    assert [(item.name, item.track) for item in kept.spans] == [("wait", ("e", "queue"))]


def test_files_are_read_back_in_wall_clock_time(tmp_path: Path) -> None:
    now_s, wall_s = time.monotonic(), time.time()
    write(tmp_path, "manager", 3, 7.0, [Span("turn 1", ("e", "w0"), now_s, now_s + 2, {"n": 1})])
    (file,) = read_spans(tmp_path, 3)
    (item,) = file.spans
    assert (file.role, file.attempt) == ("manager", 7.0)
    assert (item.name, item.unit, item.row, item.notes) == ("turn 1", "e", "w0", {"n": 1})
    assert item.end_us - item.start_us == pytest.approx(2e6, abs=2)
    assert item.start_us == pytest.approx(wall_s * 1e6, abs=0.5e6)


def test_a_process_that_dies_leaves_what_it_finished_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_files, "WRITE_EVERY_S", 0.01)
    file = SpanFile(tmp_path, "trainer-0", 1, 0.0)
    file.add(Span("rollout", ("", ""), 1.0, 2.0, {}))
    end_s = time.monotonic() + TIMEOUT_S
    while not (read := read_spans(tmp_path, 1)) or not read[0].spans:
        assert time.monotonic() < end_s, "spans are written while the step goes on"
        time.sleep(0.01)
    with file.path.open("a") as cut:
        cut.write('["train","","",2000')  # a line that a kill cut short
    assert [item.name for item in read_spans(tmp_path, 1)[0].spans] == ["rollout"]
    assert export_trace(tmp_path).exists()
    file.end()
    file.wait(TIMEOUT_S)
    (tmp_path / span_files.FOLDER / "step_000001.trainer-1.jsonl").write_text("")
    assert [item.role for item in read_spans(tmp_path, 1)] == ["trainer-0"]


def test_a_repeated_step_does_not_mix_attempts(tmp_path: Path) -> None:
    old, new = (Span(name, ("", ""), 1.0, 2.0, {}) for name in ("old", "new"))
    for role in ("manager", "trainer-0"):
        write(tmp_path, role, 4, 100.0, [old])
    write(tmp_path, "manager", 4, 200.0, [new])  # and then the trainer was killed
    assert [(file.role, file.spans[0].name) for file in read_spans(tmp_path, 4)] == [
        ("manager", "new")
    ]
    write(tmp_path, "trainer-0", 4, 200.0, [new])
    names = {item.name for file in read_spans(tmp_path, 4) for item in file.spans}
    assert names == {"new"}


def test_the_attempt_is_the_supervisors(tmp_path: Path) -> None:
    assert span_files.attempt_of(tmp_path) == 0.0
    (tmp_path / "run.json").write_text(json.dumps({"command": "train", "started_at": 12.5}))
    assert span_files.attempt_of(tmp_path) == 12.5


def test_steps_of_a_rank_are_apart_and_only_traced_ones_are_files(tmp_path: Path) -> None:
    own = StepSpans(tmp_path, "trainer-0")
    own.add(Span("load", ("", ""), 0.0, 1.0, {}))
    own.trace(3)
    for step in range(1, 7):
        own.begin(step)
        own.add(Span(f"train {step}", ("", ""), step, step + 1, {}))
        assert [item.name for item in own.spans] == [f"train {step}"]
    own.close()
    assert traced_steps(tmp_path) == [1, 3, 6]
    assert [item.name for item in read_spans(tmp_path, 6)[0].spans] == ["train 6"]


def test_a_disk_that_refuses_costs_the_trace_alone(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("in the way")
    write(tmp_path, "manager", 1, 0.0, [Span("x", ("", ""), 0.0, 1.0, {})])
    assert traced_steps(tmp_path) == []


def ends(item: StoredSpan) -> tuple[int, int]:
    return item.start_us, item.end_us


def test_lanes_hold_nested_or_separate_spans_only() -> None:
    rng = random.Random(3)
    items = [stored(start, start + rng.randint(0, 40)) for start in rng.choices(range(200), k=120)]
    found = lanes(items)
    assert sorted(map(id, itertools.chain(*found))) == sorted(map(id, items))
    for lane in found:
        assert not any(overlaps(*pair) for pair in itertools.combinations(map(ends, lane), 2))
    for lane in lanes(items, may_nest=False):
        for earlier, later in itertools.pairwise(lane):
            assert earlier.end_us <= later.start_us
    assert len(lanes([stored(0, 9), stored(1, 3), stored(3, 5)])) == 1
    assert len(lanes([stored(0, 5), stored(3, 9)])) == 2


def test_the_trace_is_in_the_viewers_format(tmp_path: Path) -> None:
    t = time.monotonic()

    def at(name: str, row: str, start: float, end: float, unit: str = "train-1-0.0") -> Span:
        return Span(name, (unit, row), t + start, t + end, {})

    write(
        tmp_path,
        "manager",
        1,
        0.0,
        [
            at("wait for a slot", "queue", 0.0, 4.0, "train-1-1.0"),
            at("turn 1", "", 0.0, 1.0),
            at("search", "", 1.0, 3.0),
            at("search", "", 2.0, 3.5),
            at("turn 1", "w0", 1.0, 2.0),
            at("browser", "w0", 1.0, 3.0),
            at("episode", "", 0.0, 4.0),
            at("score", "score", 4.0, 4.5),
            at("episode", "", 4.0, 6.0, "train-1-1.0"),
        ],
    )
    ranks = [Span("rollout", ("", ""), t - 1, t + 7, {}), Span("train", ("", ""), t + 7, t + 9, {})]
    for rank in (0, 1):
        write(tmp_path, f"trainer-{rank}", 1, 0.0, ranks)
    trace = json.loads(export_trace(tmp_path, 1).read_text())
    names = check_trace(trace)
    assert set(names.values()) == {
        *(("trainer", "rank 0"), ("trainer", "rank 1")),
        *(("episodes", "slot 0"), ("episodes", "slot 0 (2)"), ("episodes", "slot 0 w0")),
        *(("waiting for a slot", "slot 0"), ("grading", "slot 0")),
    }
    first = min(event["ts"] for event in trace["traceEvents"] if event["ph"] == "X")
    assert first == 0
    # The second episode takes the slot that the first one left.
    episodes = [e for e in trace["traceEvents"] if e["name"] == "episode"]
    assert {e["args"]["episode"] for e in episodes} == {"train-1-0.0", "train-1-1.0"}
    assert len({e["tid"] for e in episodes}) == 1
    # Perfetto shows a track whose number is its process's as a main thread, before the others.
    numbers = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["ph"] == "X"}
    assert all(pid != tid for pid, tid in numbers)


def test_a_step_without_spans_is_an_error_that_names_the_others(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none; obs\.trace_every"):
        export_trace(tmp_path)
    write(tmp_path, "trainer-0", 10, 0.0, [Span("x", ("", ""), 0.0, 1.0, {})])
    with pytest.raises(ConfigError, match="traced steps: 10"):
        export_trace(tmp_path, 3)
    assert export_trace(tmp_path).name == "step_000010.json"
    assert trace_events([]) == {"traceEvents": [], "displayTimeUnit": "ms"}
    assert spans._SCOPE.get() is None
