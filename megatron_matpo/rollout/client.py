"""The manager's interface as its clients see it: wait until it is ready, ask for episodes.

Standard library only and blocking: a trainer rank or an evaluation has nothing else to do
meanwhile.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_matpo.config.evaluation import TRAIN_SPLIT
from megatron_matpo.errors import DeadlineError, RolloutError
from megatron_matpo.types import PolicyVersion, RowAsk

HEALTH_EVERY_S = 0.2
HEALTH_TIMEOUT_S = 10.0
_FLEET_TIMEOUT_S = 60.0
_ACCEPTED = 202


class RefitWanted(Exception):
    """The collection goes on, and an engine waits for weights meanwhile; not an error."""


@dataclass(frozen=True)
class EngineState:
    """One engine as the manager knows it (`rollout.health`)."""

    index: int
    state: str
    incarnation: int
    reason: str


class ManagerClient:
    """One manager. May be used from several threads."""

    def __init__(
        self, url: str, token: str, *, start_timeout_s: float, step_timeout_s: float
    ) -> None:
        """Deadlines are `run.start_timeout_s` and `rollout.step_timeout_s`; nothing is sent yet."""
        self._url, self._token = url, token
        self._start_timeout_s, self._step_timeout_s = start_timeout_s, step_timeout_s

    def wait_ready(self) -> None:
        """Return when the manager and its tool servers are ready.

        Raises:
            DeadlineError: `start_timeout_s` passed.
        """
        end, detail = time.monotonic() + self._start_timeout_s, "no answer yet"
        while time.monotonic() < end:
            try:
                _, data = self._open("/health", None, HEALTH_TIMEOUT_S)
                health = json.loads(data)
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

    def collect(
        self,
        step: int,
        version: PolicyVersion,
        split: str,
        *,
        position: int = 0,
        asks: Sequence[RowAsk] | None = None,
        limit_s: float | None = None,
    ) -> bytes:
        """The episodes of one request, as `wire.encode` wrote them (see `RolloutManager.collect`).

        `limit_s` is the deadline if part of `step_timeout_s` has passed already.

        Raises:
            RefitWanted: an engine waits for weights; after that the same call goes on.
            RolloutError: the manager reports that the request failed, or cannot be reached.
            DeadlineError: `step_timeout_s` passed.
        """
        asked = {"step": step, "policy_version": version, "split": split, "position": position}
        if asks is not None:
            asked["rows"] = [(ask.row, ask.num_samples) for ask in asks]
        what = f"step {step}" if split == TRAIN_SPLIT else f"evaluation of {split} ({step})"
        return self._ask(what, "episodes", "/collect", json.dumps(asked).encode(), limit_s)

    def in_flight(self, step: int) -> bytes:
        """What a checkpoint after `step` has to hold (`RolloutManager.in_flight`); empty: nothing.

        Raises:
            RolloutError, DeadlineError: as `collect`.
        """
        return self._ask("groups in flight", "answer", f"/in_flight?step={step}", None)

    def restore(self, data: bytes) -> None:
        """Give back what `in_flight` gave, before the first `collect`.

        Raises:
            RolloutError, DeadlineError: as `collect`.
        """
        self._ask("groups in flight", "answer", "/in_flight", data)

    def _ask(
        self,
        what: str,
        awaited: str,
        path: str,
        body: bytes | None,
        limit_s: float | None = None,
    ) -> bytes:
        limit = self._step_timeout_s
        try:
            status, data = self._open(path, body, limit_s or limit)
        except urllib.error.HTTPError as error:
            raise RolloutError(f"{what}: {_reason(error)}") from error
        except TimeoutError as error:
            raise DeadlineError(
                f"{what}: no {awaited} after {limit:g} s (rollout.step_timeout_s)"
            ) from error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError) as error:
            raise RolloutError(
                f"{what}: the rollout manager at {self._url} broke off ({error}); "
                "its reason is in logs/manager.log"
            ) from error
        if status == _ACCEPTED:
            raise RefitWanted
        return data

    def fleet(self) -> list[EngineState]:
        """All engines, in the order of the plan.

        Raises:
            RolloutError: the manager cannot be asked.
        """
        engines = json.loads(self._exchange("/fleet", None))["engines"]
        names = ("index", "state", "incarnation", "reason")
        return [EngineState(**{name: engine[name] for name in names}) for engine in engines]

    def tell_fleet(self, word: str, said: Mapping[str, object]) -> None:
        """`POST /fleet/WORD`; see `rollout.server`.

        Raises:
            RolloutError: the manager cannot be told.
        """
        self._exchange(f"/fleet/{word}", json.dumps(said).encode())

    def _exchange(self, path: str, body: bytes | None) -> bytes:
        try:
            _, data = self._open(path, body, _FLEET_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            raise RolloutError(f"{self._url}{path}: {_reason(error)}") from error
        except (OSError, http.client.HTTPException) as error:
            raise RolloutError(
                f"the rollout manager at {self._url} does not answer {path} ({error}); "
                "its reason is in logs/manager.log"
            ) from error
        return data

    def _open(self, path: str, body: bytes | None, limit_s: float) -> tuple[int, bytes]:
        """HTTP status and body."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"}
        request = urllib.request.Request(f"{self._url}{path}", data=body, headers=headers)
        # No proxy: the manager is on loopback or on the cluster's own interface.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=limit_s) as response:
            return response.status, response.read()


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return f"the rollout manager answered HTTP {error.code}: {text[:500]}"
