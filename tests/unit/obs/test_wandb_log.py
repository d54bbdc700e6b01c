"""W&B logging: the mode, an offline run that is resumed, and that its failures stay its own.

Offline runs are real ones of the installed wandb. Not proven: anything online.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_matpo.config.root import Config
from megatron_matpo.config.run import ObsConfig
from megatron_matpo.obs import wandb_log
from megatron_matpo.obs.wandb_log import WandbLog, resolve_mode


def config(mode: str) -> Config:
    return Config(obs=ObsConfig(wandb_mode=mode))


def test_auto_is_online_only_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert resolve_mode("auto") == "online"
    assert resolve_mode("disabled") == "disabled"


def test_disabled_leaves_nothing(tmp_path: Path) -> None:
    log = WandbLog(config("disabled"), tmp_path)
    log.log(1, {"reward/total": 1.0})
    log.close()
    assert not log.is_active and list(tmp_path.iterdir()) == []


def test_an_offline_run_is_resumed_under_the_same_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for _ in range(2):
        log = WandbLog(config("offline"), tmp_path)
        assert log.is_active
        log.log(1, {"reward/total": 1.0, "mismatch/max": float("nan")})
        log.close()
    run_id = (tmp_path / "wandb/run_id").read_text().strip()
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    # Two runs of one second get the same name and a number.
    assert runs and all(run_id in name for name in runs)


class FailingRun:
    def log(self, values: dict[str, float]) -> None:
        raise ConnectionError("no network")

    def finish(self) -> None:
        time.sleep(30)


def test_failures_are_said_once_and_end_logging(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = WandbLog(config("disabled"), tmp_path)
    log._run = FailingRun()
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            log.log(step, {"reward/total": 1.0})
    assert not log.is_active
    assert len(caplog.records) == 1 and "no network" in caplog.text


def test_a_start_that_fails_or_exits_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (RuntimeError("broken"), SystemExit(1)):

        def init(error: BaseException = error, **_: object) -> None:
            raise error

        fake = SimpleNamespace(init=init, Settings=lambda **_: None)
        monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
        assert not WandbLog(config("offline"), tmp_path).is_active


def test_close_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_log, "CLOSE_TIMEOUT_S", 0.1)
    log = WandbLog(config("disabled"), tmp_path)
    log._run = FailingRun()
    begin = time.perf_counter()
    log.close()
    assert time.perf_counter() - begin < 2.0
    assert "did not finish" in caplog.text
