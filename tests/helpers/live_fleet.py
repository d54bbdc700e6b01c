"""A run that is on, seen from outside: its engines' processes, its fleet, what its engines hold.

Secrets are taken from the environment of the run's own processes, as only their user can.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from megatron_matpo.config.plan import Plan
from megatron_matpo.errors import EngineError
from megatron_matpo.rollout.engine_client import EngineClient
from megatron_matpo.wire import decode, recording_path


class LiveFleet:
    """Of the run in `run_dir`."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    @property
    def plan(self) -> Plan:
        return Plan.from_json((self.run_dir / "plan.json").read_text())

    def engine(self, index: int) -> psutil.Process:
        """The server's own process; its helpers are its children."""
        port = str(self.plan.engines[index].port)
        found = []
        for process in psutil.process_iter():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if any(part.endswith("serve.py") for part in line) and port in line:
                found.append(process)
        assert found, f"engine-{index} does not run"
        return min(found, key=lambda process: process.create_time())

    def signal(self, index: int, number: signal.Signals) -> None:
        """To the server and its helpers, as when its machine does it."""
        server = self.engine(index)
        for process in (*server.children(recursive=True), server):
            os.kill(process.pid, number)

    def secret(self, name: str) -> str:
        return self.engine_or_manager().environ()[name]

    def engine_or_manager(self) -> psutil.Process:
        """The manager, which has both secrets."""
        for process in psutil.process_iter():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if "megatron_matpo.rollout.manager" in line and str(self.run_dir) in line:
                return process
        raise AssertionError("the manager does not run")

    def engines(self) -> list[dict[str, Any]]:
        """What `GET /fleet` says."""
        headers = {"Authorization": f"Bearer {self.secret('MATPO_RUN_TOKEN')}"}
        request = urllib.request.Request(f"{self.plan.manager_url}/fleet", headers=headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)["engines"]

    def wait_for_states(self, *states: str, timeout_s: float = 240) -> None:
        end = time.monotonic() + timeout_s
        while (now := [engine["state"] for engine in self.engines()]) != list(states):
            assert time.monotonic() < end, f"{now} instead of {states}: {self.engines()}"
            time.sleep(0.2)

    def wait_for_phase(self, phase: str, step: int, timeout_s: float = 240) -> None:
        """Return as trainer rank 0 enters a phase of `step` or a later one."""
        path = self.run_dir / "status" / "trainer-0.json"
        end = time.monotonic() + timeout_s
        while True:
            status = json.loads(path.read_text()) if path.exists() else {}
            if status.get("phase") == phase and status["step"] >= step:
                return
            assert time.monotonic() < end, f"no {phase} of step {step}: {status}"
            time.sleep(0.02)

    def assert_alike(self, timeout_s: float = 60) -> int:
        """All engines hold the same version and the same weights; the version."""
        end = time.monotonic() + timeout_s
        while True:
            before = self.engines()
            held = asyncio.run(self._checksums())
            after = self.engines()
            versions = {engine["version"] for engine in (*before, *after)}
            # A push in between would compare two versions.
            if len(versions) == 1 and held is not None:
                assert all(one == held[0] for one in held), f"version {versions}"
                return versions.pop()
            assert time.monotonic() < end, f"never the same version: {before}, {after}"

    async def _checksums(self) -> list[list[dict[str, str]]] | None:
        key = self.secret("MATPO_ENGINE_KEY")
        clients = [EngineClient(place.url, key) for place in self.plan.engines]
        try:
            asked = (client.weight_checksums(deadline_s=30) for client in clients)
            return await asyncio.gather(*asked)
        except EngineError:
            return None
        finally:
            for client in clients:
                await client.close()

    def assert_episodes_whole(self, step: int, prompts: int, samples: int) -> None:
        """No episode of the step is lost, there twice, or left out; tokens are of its version."""
        batch = decode(recording_path(self.run_dir / "rollouts", step).read_bytes())
        assert len(batch.groups) == prompts
        episodes = [episode for group in batch.groups for episode in group.episodes]
        assert [len(group.episodes) for group in batch.groups] == [samples] * prompts
        doubled = [name for name, n in Counter(e.id for e in episodes).items() if n > 1]
        assert not doubled, f"step {step}"
        failures = [episode.failure for episode in episodes if episode.failure]
        assert not failures, f"step {step}"
        turns = [turn for e in episodes for t in e.trajectories for turn in t.turns]
        versions = {span.version for turn in turns for span in turn.versions}
        assert versions == {batch.policy_version}, f"step {step}"
