"""The roles of a run on one node: how each is started, and how to tell that it is ready.

Secrets go from here to the roles by environment only: `MATPO_RUN_TOKEN` (manager and trainer),
`MATPO_ENGINE_KEY` (engines and who talks to them). Variables that a tool server is given
(`tools.servers.*.env_from`) and the judge's key reach the manager alone.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_matpo.config.plan import LEADER, EnginePlace, Plan
from megatron_matpo.config.root import Config
from megatron_matpo.config.validate import Command
from megatron_matpo.launch.nodes import network_variables
from megatron_matpo.launch.run_secrets import RunSecrets
from megatron_matpo.obs.status import read_status

_PROBE_TIMEOUT_S = 1.0
# The first generation compiles and allocates.
_GENERATE_TIMEOUT_S = 5.0
# Phases in which a rank has not built its model yet.
_TRAINER_STARTING = frozenset({"start", "init", "take memory", "build model"})
# Those in which the first rank has not trained since this start.
_NOTHING_TRAINED = _TRAINER_STARTING | {"load", "connect"}
_ENTRIES: dict[Command, str] = {
    "train": "megatron_matpo.trainer.main",
    "sft": "megatron_matpo.trainer.sft",
}


@dataclass(frozen=True)
class RestartPolicy:
    """How a role is started anew."""

    max_restarts: int
    """0: its end ends the run."""
    backoff_s: float
    """Before the first restart; doubles with each further one."""
    backoff_max_s: float
    num_peers: int
    """Roles of the kind on all nodes, itself included; the run goes on while one is left."""

    def pause_s(self, num_restarts: int) -> float:
        """Before the restart that follows `num_restarts` earlier ones."""
        return min(self.backoff_max_s, self.backoff_s * 2.0**num_restarts)


@dataclass(frozen=True)
class RoleSpec:
    """One process to start and watch."""

    name: str
    """Instance, as in `engine-0`; its log is `logs/NAME.log`."""
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    is_ready: Callable[[], bool]
    """Quick, does not raise, is asked repeatedly."""
    ends_run: bool = False
    """The run is over, successfully, when this process ends with exit code 0."""
    may_end: bool = False
    """It may end with exit code 0 before the run is over."""
    is_needed_to_save: bool = False
    """The run cannot save a checkpoint without it."""
    stop_signal: int = signal.SIGTERM
    """How it is asked to stop."""
    restarts: RestartPolicy | None = None
    """How it is started anew when it ends after it was ready; None: its end ends the run."""


def plan_roles(
    config: Config,
    plan: Plan,
    run_dir: Path,
    command: Command,
    own: RunSecrets,
    node: int = LEADER,
) -> list[RoleSpec]:
    """All roles of the run on `node`.

    Engines and manager, unless episodes are replayed or none are needed; and what the run is for:
    the trainer, or the evaluation.
    """
    roles: list[RoleSpec] = []
    if command == "eval" or (command == "train" and not config.rollout.replay):
        roles += [
            _engine(config, place, own, serves_own_weights=command == "eval")
            for place in plan.engines
            if place.node == node
        ]
        if node == LEADER:
            roles.append(_manager(config, plan, run_dir, own))
    if command == "eval" and node == LEADER:
        roles.append(_evaluation(config, run_dir, own))
    if command != "eval" and plan.trainer_ranks_per_node[node] > 0:
        roles.append(_trainer(config, plan, run_dir, _ENTRIES[command], own, node))
    settings = _settings(config, plan)
    return [replace(role, env={**role.env, **settings}) for role in roles]


def _engine(
    config: Config, place: EnginePlace, own: RunSecrets, *, serves_own_weights: bool
) -> RoleSpec:
    from megatron_matpo.rollout.engine_command import engine_command, engine_spec

    started = engine_command(
        engine_spec(config, place, own.engine_key, serves_own_weights=serves_own_weights)
    )
    return RoleSpec(
        name=f"engine-{place.index}",
        argv=tuple(started.argv),
        env={**_environment(config), **started.env},
        is_ready=lambda: engine_generates(place.url, own.engine_key),
        restarts=_restarts(config),
    )


def _restarts(config: Config) -> RestartPolicy:
    rollout = config.rollout
    # The control experiment could not give a new engine the weights that the others keep.
    can_restart = config.transport != "none" and config.cluster.placement != "colocated"
    return RestartPolicy(
        max_restarts=rollout.max_engine_restarts if can_restart else 0,
        backoff_s=rollout.restart_backoff_s,
        backoff_max_s=rollout.restart_backoff_max_s,
        num_peers=rollout.num_servers,
    )


def _manager(config: Config, plan: Plan, run_dir: Path, own: RunSecrets) -> RoleSpec:
    return RoleSpec(
        name="manager",
        argv=(sys.executable, "-m", "megatron_matpo.rollout.manager", "--run-dir", str(run_dir)),
        env={**os.environ, **_secret_env(own)},
        is_ready=lambda: manager_is_ready(plan.manager_url, own.run_token),
        stop_signal=_stop_signal(config),
    )


def _stop_signal(config: Config) -> int:
    """Of what a save needs: a scheduler's SIGTERM must not end it."""
    return signal.SIGINT if config.run.save_on_stop else signal.SIGTERM


def _evaluation(config: Config, run_dir: Path, own: RunSecrets) -> RoleSpec:
    return RoleSpec(
        name="evaluation",
        argv=(sys.executable, "-m", "megatron_matpo.evaluation.main", "--run-dir", str(run_dir)),
        env={**_environment(config), **_secret_env(own)},
        is_ready=lambda: any(status.role == "evaluation" for status in read_status(run_dir)),
        ends_run=True,
    )


def _trainer(
    config: Config, plan: Plan, run_dir: Path, entry: str, own: RunSecrets, node: int
) -> RoleSpec:
    """One torchrun agent. The leader's is ready, and done, when all ranks are."""
    argv = [sys.executable, "-m", "megatron_matpo.launch.torchrun", "--run-dir", str(run_dir)]
    is_leader, num_ranks = node == LEADER, sum(plan.trainer_ranks_per_node)
    return RoleSpec(
        name="trainer" if is_leader else f"trainer-node-{node}",
        argv=(*argv, "--entry", entry, "--node", str(node)),
        env={**_environment(config), **_secret_env(own)},
        is_ready=lambda: not is_leader or trainer_is_ready(run_dir, num_ranks),
        ends_run=is_leader,
        may_end=not is_leader,
        is_needed_to_save=True,
        stop_signal=_stop_signal(config),
    )


def engine_generates(url: str, key: str) -> bool:
    """Whether the engine at `url` has answered a generation of one token."""
    status, _ = _get(f"{url}/health", key, _PROBE_TIMEOUT_S)
    if status != 200:
        return False
    status, _ = _get(f"{url}/health_generate", key, _GENERATE_TIMEOUT_S)
    return status == 200


def manager_is_ready(url: str, token: str) -> bool:
    """Whether the manager says that its engines and tool servers are ready."""
    status, body = _get(f"{url}/health", token, _PROBE_TIMEOUT_S)
    if status != 200:
        return False
    try:
        return bool(json.loads(body)["ready"])
    except (ValueError, KeyError, TypeError):
        return False


def trainer_is_ready(run_dir: Path, num_ranks: int) -> bool:
    """Whether every rank has built its model."""
    ranks = [status for status in read_status(run_dir) if status.role == "trainer"]
    ready = [status for status in ranks if status.phase not in _TRAINER_STARTING]
    return len(ready) == num_ranks


def trainer_has_begun(run_dir: Path) -> bool | None:
    """Whether the first rank has more than loaded and waited for engines; None if it is silent."""
    for status in read_status(run_dir):
        if status.role == "trainer" and status.rank == 0:
            return status.phase not in _NOTHING_TRAINED
    return None


def _get(url: str, token: str, timeout_s: float) -> tuple[int, bytes]:
    """(HTTP status, body); status 0 if there was no answer."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    # Proxies of the environment must not see the run's own traffic.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""
    except (OSError, ValueError, http.client.HTTPException):
        return 0, b""


def _secret_env(own: RunSecrets) -> dict[str, str]:
    return {"MATPO_RUN_TOKEN": own.run_token, "MATPO_ENGINE_KEY": own.engine_key}


def _environment(config: Config) -> dict[str, str]:
    """Our environment without what is meant for tool servers and judge only."""
    secret = {name for server in config.tools.servers.values() for name in server.env_from}
    secret.add(config.reward.judge.api_key_env)
    return {name: value for name, value in os.environ.items() if name not in secret}


def _settings(config: Config, plan: Plan) -> dict[str, str]:
    """What every role gets.

    Logs are complete when a process is killed; a proxy never sees the run's own traffic; process
    groups meet through the interface that servers bind to, unless the environment names another.
    """
    direct = [os.environ.get("NO_PROXY") or os.environ.get("no_proxy", "")]
    direct += [*dict.fromkeys(plan.hosts), "127.0.0.1", "localhost"]
    names = ",".join(filter(None, direct))
    return {
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "NO_PROXY": names,
        "no_proxy": names,
        **network_variables(config.cluster, os.environ),
        **_nccl_variables(config),
    }


def _nccl_variables(config: Config) -> dict[str, str]:
    """Trainer and engines share a process group, and NCCL wants this to be alike in all of it.

    SGLang sets 0 where the environment says nothing (`sglang/srt/entrypoints/engine.py`,
    `_set_envs_and_config`); NCCL's own default is another one.
    """
    if config.cluster.device == "cpu":
        return {}
    return {"NCCL_CUMEM_ENABLE": os.environ.get("NCCL_CUMEM_ENABLE", "0")}
