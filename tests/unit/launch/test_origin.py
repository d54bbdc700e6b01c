"""Proves which of several ended processes is named as the first failure."""

from __future__ import annotations

import time

import pytest

from megatron_matpo.errors import ConfigError
from megatron_matpo.launch.origin import Death, describe_exit, find_origin, last_lines
from megatron_matpo.launch.torchrun_files import exits_file
from megatron_matpo.obs.failure import record_failure
from megatron_matpo.obs.status import PhaseWriter


@pytest.fixture
def run_dir(tmp_path):
    for name in ("status", "logs"):
        (tmp_path / name).mkdir()
    return tmp_path


def fail(run_dir, role, rank, error):
    record_failure(run_dir, role, rank, "sync", error, "traceback")


def test_nothing_failed(run_dir):
    assert find_origin(run_dir, []) is None


def test_an_engine_that_died_silently_beats_the_trainer_that_noticed(run_dir):
    fail(run_dir, "trainer", 0, ValueError("engine 0 does not answer"))
    deaths = [Death("engine-0", -9, time.time()), Death("trainer", 1, time.time())]
    origin = find_origin(run_dir, deaths)
    assert origin is not None
    assert origin.name == "engine-0"
    assert "SIGKILL" in origin.what


def test_an_engine_that_died_long_after_the_trainer_is_not_the_origin(run_dir):
    fail(run_dir, "trainer", 1, ValueError("bad number"))
    origin = find_origin(run_dir, [Death("engine-0", 0, time.time() + 5)])
    assert origin is not None
    assert (origin.name, origin.phase) == ("trainer-1", "sync")
    assert origin.what == "ValueError: bad number"


def test_a_manager_that_says_why_is_quoted(run_dir):
    fail(run_dir, "manager", 0, ValueError("no tools"))
    origin = find_origin(run_dir, [Death("manager", 1, time.time())])
    assert origin is not None
    assert (origin.name, origin.log_name) == ("manager", "manager")
    assert "no tools" in origin.what


def test_a_rank_that_a_signal_ended_beats_its_peers_complaints(run_dir):
    PhaseWriter(run_dir, "trainer", 1).set("train", 3)
    fail(run_dir, "trainer", 0, RuntimeError("[gloo] Connection closed by peer"))
    (run_dir / "status" / exits_file(0)).write_text("1 -9 7\n0 1 8\n")
    origin = find_origin(run_dir, [Death("trainer", 1, time.time())])
    assert origin is not None
    assert (origin.name, origin.phase) == ("trainer-1", "train")
    assert "SIGKILL" in origin.what


def test_a_rank_that_ended_without_a_word_is_named(run_dir):
    (run_dir / "status" / exits_file(0)).write_text("1 3 7\n0 -15 8\n")
    origin = find_origin(run_dir, [Death("trainer", 1, time.time())])
    assert origin is not None
    assert (origin.name, origin.log_name) == ("trainer-1", "trainer-1")
    assert "exit code 3" in origin.what


def test_a_rank_that_was_stopped_because_of_another_is_not_the_origin(run_dir):
    fail(run_dir, "trainer", 0, ValueError("bad number"))
    (run_dir / "status" / exits_file(0)).write_text("1 -15 7\n0 1 8\n")
    origin = find_origin(run_dir, [Death("trainer", 1, time.time())])
    assert origin is not None
    assert origin.name == "trainer-0"


def test_a_wrong_configuration_has_its_own_exit_code(run_dir):
    fail(run_dir, "trainer", 0, ConfigError("parallel.tensor=3"))
    origin = find_origin(run_dir, [])
    assert origin is not None
    assert origin.exit_code == 2


@pytest.mark.parametrize(
    ("code", "text"), [(3, "exit code 3"), (-15, "ended by SIGTERM"), (-250, "signal 250")]
)
def test_exit_codes_are_told_in_words(code, text):
    assert text in describe_exit(code)


def test_the_last_lines_leave_out_noise_and_earlier_attempts(run_dir):
    log = run_dir / "logs" / "engine-0.log"
    log.write_text("earlier\n")
    size = log.stat().st_size
    noise = 'INFO: 127.0.0.1 - "POST /generate HTTP/1.1" 200 OK\n'
    log.write_text("earlier\n" + "".join(f"line {i}\n{noise}" for i in range(30)))
    assert last_lines(log, size) == [f"line {i}" for i in range(10, 30)]
    assert last_lines(log, log.stat().st_size) == []
    assert last_lines(run_dir / "missing.log") == []
