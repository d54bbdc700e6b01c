"""A supervised run of FakeRoles (`tests/unit/launch/fake_run.py`) in a subprocess."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

FAKE_RUN = Path(__file__).parents[1] / "unit" / "launch" / "fake_run.py"


class FakeRun:
    """A supervised run of FakeRoles in a subprocess."""

    def __init__(
        self,
        run_dir: Path,
        *roles: str,
        start_timeout_s: float = 30,
        grace_s: float = 0.4,
        **environ: str,
    ):
        for name in ("logs", "status"):
            (run_dir / name).mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self._mark = f"{run_dir}#{environ.get('MATPO_NODE_RANK', '0')}"
        self.started = time.monotonic()
        argv = [sys.executable, str(FAKE_RUN), str(run_dir), str(start_timeout_s), str(grace_s)]
        self.process = subprocess.Popen(
            [*argv, *roles],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # The tests themselves may run under nohup, and an ignored SIGHUP stays ignored.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            env={**os.environ, "MATPO_TEST_MARK": self._mark, "PYTHONPATH": os.getcwd(), **environ},
        )

    def wait(self, timeout_s: float = 20) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, output

    def wait_for_line(self, pattern: str) -> re.Match[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"no line with {pattern}")

    def wait_for_log(self, name: str, text: str) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            log = self.run_dir / "logs" / f"{name}.log"
            if log.exists() and text in log.read_text():
                return
            time.sleep(0.02)
        raise AssertionError(f"no {text!r} in the log of {name}")

    def survivors(self) -> list[str]:
        """Command lines of living processes that this run has started."""
        return [command for _, command in self._living()]

    def pids(self) -> list[int]:
        """Processes that this command has started, itself included."""
        return [pid for pid, _ in self._living()]

    def _living(self) -> list[tuple[int, str]]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes()
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if f"MATPO_TEST_MARK={self._mark}".encode() in environment.split(b"\0"):
                found.append((int(folder.name), command))
        return found

    def assert_nothing_left(self, within_s: float = 6) -> None:
        deadline = time.monotonic() + within_s
        while self.survivors() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.survivors() == []
