"""Proves that `matpo logs` shows every line once, in order of time, and survives rotation."""

from __future__ import annotations

import io
import subprocess
import time
from contextlib import redirect_stdout
from datetime import datetime
from pathlib import Path

import pytest

from megatron_matpo.config.plan import EnginePlace, Plan
from megatron_matpo.errors import ConfigError
from megatron_matpo.launch.logs import LogsRequest, RunLogs, line_time, show_logs
from tests.helpers.matpo import matpo_command


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


def write(run: Path, name: str, *lines: str, mode: str = "a") -> Path:
    path = run / "logs" / f"{name}.log"
    with path.open(mode) as file:
        file.write("".join(f"{line}\n" for line in lines))
    return path


def texts(logs: RunLogs) -> list[str]:
    return [f"{line.source}: {line.text}" for line in logs.merged()]


def shown(run: Path, **options) -> list[str]:
    output = io.StringIO()
    with redirect_stdout(output):
        assert show_logs(LogsRequest(str(run), **options)) == 0
    return [line.split(" | ", 1)[1] for line in output.getvalue().splitlines()]


def test_lines_of_all_roles_are_in_order_of_time(run):
    write(run, "manager", "2026-11-25 10:00:01,500 a", "2026-11-25 10:00:03,000 d")
    write(run, "engine-0", "[2026-11-25 10:00:02] b", "  c has no time", "[2026-11-25 10:00:04] e")
    write(run, "trainer-0", "W1125 10:00:05.250 12 f")
    order = [text[-1] if "time" not in text else "c" for text in shown(run)]
    assert order == ["a", "b", "c", "d", "e", "f"]


def test_a_file_without_times_stands_at_its_last_change(run):
    write(run, "trainer-0", "no time at all")
    moment = datetime.now().strftime("%Y-%m-%d")
    write(run, "manager", f"{moment} 00:00:00 before", "2099-01-01 00:00:00 after")
    assert [text.split()[-1] for text in shown(run)] == ["before", "all", "after"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-25 10:00:01,250 x", datetime(2026, 11, 25, 10, 0, 1, 250000)),
        ("[2026-11-25T10:00:01.5] x", datetime(2026, 11, 25, 10, 0, 1, 500000)),
        ("I1125 10:00:01.000123 9 x", datetime(2026, 11, 25, 10, 0, 1, 123)),
    ],
)
def test_times(text, expected):
    found = line_time(text, datetime(2026, 12, 1).timestamp())
    assert found == pytest.approx(expected.timestamp())


def test_times_with_a_zone():
    utc = line_time("2026-11-25T10:00:00Z x", 0.0)
    assert utc == line_time("2026-11-25T12:00:00+02:00 x", 0.0)


@pytest.mark.parametrize(
    "text", ["", "x" * 90 + "2026-11-25 10:00:00", "2026-99-25 10:00:00", "12:00"]
)
def test_no_times(text):
    assert line_time(text, 0.0) is None


def test_only_new_whole_lines_come_later(run):
    logs = RunLogs(run)
    path = write(run, "manager", "one")
    assert texts(logs) == ["manager: one"]
    with path.open("a") as file:
        file.write("tw")
    assert texts(logs) == []
    with path.open("a") as file:
        file.write("o\nthree\n")
    assert texts(logs) == ["manager: two", "manager: three"]
    write(run, "engine-0", "a new role")
    assert texts(logs) == ["engine-0: a new role"]


def test_a_file_that_is_cut_off_is_read_from_its_head(run):
    logs = RunLogs(run)
    write(run, "manager", "one", "two", "three")
    texts(logs)
    write(run, "manager", "x", mode="w")
    assert texts(logs) == ["manager: x"]


def test_a_file_that_is_rotated_loses_no_line(run):
    logs = RunLogs(run)
    path = write(run, "manager", "one")
    texts(logs)
    write(run, "manager", "two")
    path.rename(path.with_suffix(".log.1"))
    write(run, "manager", "three")
    assert texts(logs) == ["manager: two", "manager: three"]


def test_a_progress_bar_is_its_last_state(run):
    write(run, "engine-0", "10%\r50%\r\x1b[2K\x1b[1;32m100%\x1b[0m")
    assert shown(run) == ["100%"]


def test_bytes_that_are_no_text_do_not_stop_it(run):
    (run / "logs" / "engine-0.log").write_bytes(b"\xff\xfe\n")
    assert len(shown(run)) == 1


def test_by_role(run):
    for name in ("trainer-0", "trainer-1", "tool-search-0", "manager"):
        write(run, name, name)
    assert sorted(shown(run, role="trainer")) == ["trainer-0", "trainer-1"]
    assert shown(run, role="trainer-1") == ["trainer-1"]
    assert shown(run, role="tool-*") == ["tool-search-0"]
    with pytest.raises(ConfigError, match="no such log; there are manager, "):
        shown(run, role="engine")


def test_by_node(run):
    places = tuple(EnginePlace(i, 1, "h", 1, 2, ()) for i in range(2))
    plan = Plan(("h", "h"), 1, (2, 0), 2, 3, places)
    (run / "plan.json").write_text(plan.to_json())
    leaders = ["evaluation", "manager", "trainer", "trainer-0", "trainer-1"]
    for name in (*leaders, "engine-0", "trainer-node-1"):
        write(run, name, name)
    assert sorted(shown(run, node=0)) == leaders
    assert sorted(shown(run, node=1)) == ["engine-0", "trainer-node-1"]
    assert {line.source for line in RunLogs(run, "engine").merged()} == {"engine-0@1"}


def test_since_and_the_last_lines(run):
    write(run, "manager", "2020-11-25 10:00:00 a", "2020-11-25 11:00:00 b", "more", "last")
    assert [text[-1] for text in shown(run, since="2020-11-25T10:30")] == ["b", "e", "t"]
    assert shown(run, since="1d") == []
    assert shown(run, lines=1) == ["last"]
    with pytest.raises(ConfigError, match="--since yesterday: expected 30s"):
        shown(run, since="yesterday")


def test_not_a_run_folder(tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        shown(tmp_path)


def test_following_shows_what_comes_and_ends_with_ctrl_c(run, tmp_path):
    write(run, "manager", "before")
    output = tmp_path / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(matpo_command("logs", str(run), "-f"), stdout=file)
    try:
        _wait_for(output, "before")
        write(run, "manager", "later")
        _wait_for(output, "later")
        process.send_signal(2)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
    assert output.read_text().count("before") == 1


def _wait_for(path: Path, text: str) -> None:
    end = time.monotonic() + 60
    while text not in path.read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
