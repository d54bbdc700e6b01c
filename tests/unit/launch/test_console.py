"""Proves what is printed with and without a terminal, and that each finished step is shown once."""

from __future__ import annotations

import io
import json

from megatron_matpo.launch.console import Console, ProgressView
from megatron_matpo.obs.status import PhaseWriter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def append(run_dir, step: int) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time/step_s": 2.0, "reward/total": 0.5}) + "\n")


def steps_in(text: str) -> list[str]:
    return [line.split(" ")[1] for line in text.splitlines() if line.startswith("step ")]


def test_without_a_terminal_only_finished_steps_appear(tmp_path):
    stream = io.StringIO()
    PhaseWriter(tmp_path, "trainer", 0).set("train", 1)
    view = ProgressView(tmp_path, 3, Console(stream))
    view.update()
    assert stream.getvalue() == ""
    append(tmp_path, 1)
    view.update()
    append(tmp_path, 2)
    view.update()
    view.update()
    assert steps_in(stream.getvalue()) == ["1/3", "2/3"]
    assert "ETA 0:02" in stream.getvalue()


def test_why_a_step_was_slow_is_told_below_it(tmp_path):
    stream = io.StringIO()
    view = ProgressView(tmp_path, 3, Console(stream))
    append(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "reward/total": 0.5, "why": "sync 40 s: x"}) + "\n")
    view.update()
    first, second, why = stream.getvalue().splitlines()
    assert first.startswith("step 1/3")
    assert second.startswith("step 2/3")
    assert why == "  slow: sync 40 s: x"


def test_on_a_terminal_the_live_line_names_step_and_phase(tmp_path):
    stream = Terminal()
    view = ProgressView(tmp_path, 3, Console(stream))
    view.update()
    assert "starting" in stream.getvalue()
    PhaseWriter(tmp_path, "trainer", 0).set("rollout", 2)
    view.update()
    assert "step 2/3: rollout 0:0" in stream.getvalue()
    assert "\n" not in stream.getvalue()


def test_a_line_that_is_still_being_written_waits(tmp_path):
    stream = io.StringIO()
    view = ProgressView(tmp_path, 3, Console(stream))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "rew')
    view.update()
    assert stream.getvalue() == ""


def test_steps_of_an_earlier_attempt_are_not_shown_again(tmp_path):
    append(tmp_path, 1)
    append(tmp_path, 2)
    stream = io.StringIO()
    view = ProgressView(tmp_path, 3, Console(stream))
    view.update()
    shorter = tmp_path / "new"
    shorter.write_text((tmp_path / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    shorter.replace(tmp_path / "metrics.jsonl")
    view.update()
    append(tmp_path, 2)
    view.update()
    assert steps_in(stream.getvalue()) == ["2/3"]
