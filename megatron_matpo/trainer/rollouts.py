"""Where a step's episodes come from: the rollout manager, or a recording."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import distributed as dist

from megatron_matpo.config.rollout import RolloutConfig
from megatron_matpo.errors import DataError, DeadlineError, RolloutError
from megatron_matpo.types import PolicyVersion, RolloutBatch
from megatron_matpo.wire import decode, recording_path

HEALTH_EVERY_S = 0.2
HEALTH_TIMEOUT_S = 10.0


class Rollouts(Protocol):
    """A source of episodes. All ranks call and all get the same batch."""

    def connect(self) -> None:
        """Wait until the source can be asked."""
        ...

    def collect(self, step: int, version: PolicyVersion, split: str = "train") -> RolloutBatch:
        """Episodes of `step`, sampled with policy `version`."""
        ...


class ManagerRollouts:
    """Asks the manager from rank 0 and hands its bytes to every rank."""

    def __init__(
        self,
        config: RolloutConfig,
        url: str,
        token: str,
        share: Callable[[bytes | None], bytes],
        *,
        is_first_rank: bool,
        start_timeout_s: float,
    ) -> None:
        """`share` broadcasts rank 0's bytes to all ranks (see `share_bytes`)."""
        self._config = config
        self._start_timeout_s = start_timeout_s
        self._url, self._token = url, token
        self._share = share
        self._is_first_rank = is_first_rank

    def connect(self) -> None:
        """Wait until the manager and its tool servers are ready (rank 0; elsewhere nothing).

        Raises:
            DeadlineError: `start_timeout_s` passed.
        """
        if not self._is_first_rank:
            return
        end, detail = time.monotonic() + self._start_timeout_s, "no answer yet"
        while time.monotonic() < end:
            try:
                health = json.loads(self._open("/health", None, HEALTH_TIMEOUT_S))
            except (OSError, ValueError, http.client.HTTPException) as error:
                detail = str(error)
            else:
                if health["ready"]:
                    return
                detail = health["detail"]
            time.sleep(HEALTH_EVERY_S)
        raise DeadlineError(
            f"the rollout manager at {self._url} is not ready after {self._start_timeout_s:g} s "
            f"(run.start_timeout_s): {detail}"
        )

    def collect(self, step: int, version: PolicyVersion, split: str = "train") -> RolloutBatch:
        """As `Rollouts.collect`.

        Raises:
            RolloutError: the manager reports that the step failed, or cannot be reached.
            DeadlineError: `rollout.step_timeout_s` passed.
        """
        data = self._request(step, version, split) if self._is_first_rank else None
        return decode(self._share(data), f"rollout batch of step {step}")

    def _request(self, step: int, version: PolicyVersion, split: str) -> bytes:
        body = json.dumps({"step": step, "policy_version": version, "split": split}).encode()
        limit = self._config.step_timeout_s
        try:
            return self._open("/collect", body, limit)
        except urllib.error.HTTPError as error:
            raise RolloutError(f"step {step}: {_reason(error)}") from error
        except TimeoutError as error:
            raise DeadlineError(
                f"step {step}: no episodes after {limit:g} s (rollout.step_timeout_s)"
            ) from error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError) as error:
            raise RolloutError(
                f"step {step}: the rollout manager at {self._url} broke off ({error}); "
                "its reason is in logs/manager.log"
            ) from error

    def _open(self, path: str, body: bytes | None, limit_s: float) -> bytes:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"}
        request = urllib.request.Request(f"{self._url}{path}", data=body, headers=headers)
        # No proxy: the manager is on loopback or on the cluster's own interface.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=limit_s) as response:
            return response.read()


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return f"the rollout manager answered HTTP {error.code}: {text[:500]}"


class ReplayRollouts:
    """Reads recorded `step_N.rollout` files; every rank reads for itself."""

    def __init__(self, folder: str) -> None:
        """Keep the folder; a missing step is reported when it is asked for."""
        self._folder = Path(folder)

    def connect(self) -> None:
        """Nothing to wait for."""

    def collect(self, step: int, version: PolicyVersion, split: str = "train") -> RolloutBatch:
        """The recorded batch of `step`, whatever version sampled it.

        Raises:
            DataError: no recording of that step.
        """
        path = recording_path(self._folder, step)
        if not path.exists():
            raise DataError(
                f"rollout.replay={self._folder}: has no {path.name}; record with "
                "obs.record_rollouts=true or lower run.steps"
            )
        return decode(path.read_bytes(), str(path))


def share_bytes(data: bytes | None, group: dist.ProcessGroup, device: torch.device) -> bytes:
    """Rank 0's bytes on every rank of `group`, which all call; blocks until rank 0 has data."""
    size = torch.tensor([len(data) if data is not None else 0], dtype=torch.long, device=device)
    dist.broadcast(size, src=0, group=group)
    buffer = torch.empty(int(size.item()), dtype=torch.uint8, device=device)
    if data is not None:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(buffer, src=0, group=group)
    return data if data is not None else buffer.cpu().numpy().tobytes()
