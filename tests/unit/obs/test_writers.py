"""Metrics, status and failure files survive crashes, resumes and concurrent readers.

Real files, no fakes. Not proven here: durability over a power cut (fsync is trusted).
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest

from megatron_matpo.errors import ConfigError, EngineUnreachable, NonFiniteError
from megatron_matpo.obs import failure, metrics, metrics_log, status

REPO = Path(__file__).resolve().parents[3]


def full_line(**changes: float) -> dict[str, float]:
    return {name: 1.0 for name in metrics.REQUIRED if name != "step"} | changes


def test_one_line_per_step_with_all_required_names(tmp_path: Path) -> None:
    writer = metrics_log.MetricsWriter(tmp_path)
    writer.write(1, full_line())
    writer.write(2, full_line() | {"rollout/status/answered": 0.5, "eval/gaia/mean@8": 1})
    lines = metrics_log.read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1].keys() - metrics.REQUIRED == {"rollout/status/answered", "eval/gaia/mean@8"}


def test_unknown_missing_and_non_numeric_values_are_refused(tmp_path: Path) -> None:
    writer = metrics_log.MetricsWriter(tmp_path)
    with pytest.raises(ValueError, match="unknown metric 'rewards/total'"):
        writer.write(1, full_line() | {"rewards/total": 1.0})
    with pytest.raises(ValueError, match="lack loss/policy"):
        writer.write(1, {name: 1.0 for name in metrics.REQUIRED if name != "loss/policy"})
    with pytest.raises(ValueError, match="must be a number, got str"):
        writer.write(1, full_line() | {"loss/policy": "1"})  # type: ignore[dict-item]
    assert metrics_log.read_metrics(tmp_path) == []
    writer.write(0, {"eval/gaia/mean@8": 0.5}, partial=True)
    assert metrics_log.read_metrics(tmp_path) == [{"step": 0, "eval/gaia/mean@8": 0.5}]


def test_non_finite_values_become_null(tmp_path: Path) -> None:
    writer = metrics_log.MetricsWriter(tmp_path)
    writer.write(1, full_line(**{"mismatch/max": math.nan, "policy/ratio": math.inf}))
    (line,) = metrics_log.read_metrics(tmp_path)
    assert line["mismatch/max"] is None
    assert line["policy/ratio"] is None


def test_why_is_a_text_that_readers_of_numbers_do_not_see(tmp_path: Path) -> None:
    writer = metrics_log.MetricsWriter(tmp_path)
    writer.write(1, full_line())
    for step in (2, 3):
        writer.write(step, full_line(), why=f"train {step} s: usually 1 s")
    assert all("why" not in line for line in metrics_log.read_metrics(tmp_path))
    assert metrics_log.read_why(tmp_path).keys() == {2, 3}
    writer.truncate_after(2)
    assert metrics_log.read_why(tmp_path) == {2: "train 2 s: usually 1 s"}


def test_resume_drops_later_steps_and_a_line_cut_short(tmp_path: Path) -> None:
    writer = metrics_log.MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, full_line())
    with writer.path.open("a") as file:
        file.write('{"step": 6, "rewa')
    writer = metrics_log.MetricsWriter(tmp_path)
    assert writer.path.read_bytes().endswith(b"\n")
    writer.truncate_after(3)
    writer.write(4, full_line(**{"optim/lr": 7.0}))
    lines = metrics_log.read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["optim/lr"] == 7.0
    assert [path.name for path in tmp_path.iterdir()] == [metrics_log.FILE_NAME]


def test_docs_are_generated_from_the_registry() -> None:
    assert (REPO / "docs/metrics.md").read_text() == metrics.render_docs(), (
        "run: python -m megatron_matpo.obs.metrics > docs/metrics.md"
    )


def test_specs_are_complete_and_unique() -> None:
    names = [spec.name for spec in metrics.METRICS]
    assert len(names) == len(set(names))
    assert all(spec.reduction and spec.description for spec in metrics.METRICS)
    assert metrics.spec_of("rollout/retries").name == "rollout/retries"
    assert metrics.spec_of("rollout/status/overflow").name == "rollout/status/*"
    assert metrics.spec_of("rollout/anything").name == "rollout/*"


def test_status_is_replaced_and_read_back(tmp_path: Path) -> None:
    before = time.time()
    trainer = status.PhaseWriter(tmp_path, "trainer", 1)
    manager = status.PhaseWriter(tmp_path, "manager", 0)
    trainer.set("starting")
    trainer.set("train", step=3, micro_batches=4)
    manager.set("ready", url="http://127.0.0.1:1")
    (tmp_path / "status/broken-0.json").write_text("{")
    first, second = status.read_status(tmp_path)
    assert (first.role, first.phase, first.step) == ("manager", "ready", -1)
    assert first.fields == {"url": "http://127.0.0.1:1"}
    assert (second.rank, second.phase, second.step, second.pid) == (1, "train", 3, os.getpid())
    assert before <= second.started_at <= second.updated_at <= time.time()
    status.clear_status(tmp_path)
    assert status.read_status(tmp_path) == []
    assert status.read_status(tmp_path / "no-such-run") == []


def test_first_failure_is_the_cause_not_its_echo(tmp_path: Path) -> None:
    echo = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]")
    failure.record_failure(tmp_path, "trainer", 0, "train", echo, "")
    failure.record_failure(tmp_path, "manager", 0, "collect", EngineUnreachable("engine-0"), "")
    failure.record_failure(
        tmp_path, "trainer", 1, "train", NonFiniteError("grad norm is nan"), "Traceback ..."
    )
    found = failure.first_failure(tmp_path)
    assert found is not None
    assert (found.role, found.rank, found.phase) == ("trainer", 1, "train")
    assert (found.type, found.message, found.exit_code) == ("NonFiniteError", "grad norm is nan", 1)
    assert found.traceback == "Traceback ..."
    assert [item.role for item in failure.all_failures(tmp_path)] == [
        "trainer",
        "manager",
        "trainer",
    ]


def test_the_earliest_echo_is_better_than_nothing(tmp_path: Path) -> None:
    assert failure.first_failure(tmp_path) is None
    failure.record_failure(tmp_path, "trainer", 1, "sync", BrokenPipeError("a"), "")
    failure.record_failure(tmp_path, "trainer", 0, "sync", BrokenPipeError("b"), "")
    found = failure.first_failure(tmp_path)
    assert found is not None and found.rank == 1


def test_first_failure_of_a_rank_stays_and_clear_removes(tmp_path: Path) -> None:
    failure.record_failure(tmp_path, "cli", 0, "config", ConfigError("bad"), "")
    failure.record_failure(tmp_path, "cli", 0, "close", OSError("later"), "")
    found = failure.first_failure(tmp_path)
    assert found is not None and (found.message, found.exit_code) == ("bad", 2)
    status.PhaseWriter(tmp_path, "cli", 0).set("closing")
    failure.clear(tmp_path)
    assert failure.first_failure(tmp_path) is None
    assert len(status.read_status(tmp_path)) == 1, "clear leaves the status files alone"


def test_a_damaged_failure_file_hides_no_other(tmp_path: Path) -> None:
    failure.record_failure(tmp_path, "trainer", 0, "train", ValueError("x"), "")
    (tmp_path / "status/failure-manager-0.json").write_text(json.dumps({"role": "manager"}))
    found = failure.first_failure(tmp_path)
    assert found is not None and found.role == "trainer"
