"""Proves what each role is started with, where secrets go, and when a role counts as ready.

FakeServer answers like an engine or a manager; real ones are started by the smoke tests.
"""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from megatron_matpo.config import Config
from megatron_matpo.config.tools import McpServerConfig, ToolsConfig
from megatron_matpo.config.train import ParallelConfig
from megatron_matpo.launch.roles import (
    RestartPolicy,
    RoleSpec,
    engine_generates,
    manager_is_ready,
    plan_roles,
    trainer_is_ready,
)
from megatron_matpo.launch.run_secrets import RunSecrets
from megatron_matpo.obs.status import PhaseWriter
from tests.helpers.plans import lone_plan


@pytest.fixture
def config() -> Config:
    base = Config()
    return replace(
        base,
        rollout=replace(base.rollout, num_servers=2),
        tools=ToolsConfig({"search": McpServerConfig(command="npx", env_from=["SERPER_API_KEY"])}),
    )


def roles_of(config: Config, run_dir, command="train") -> dict[str, RoleSpec]:
    roles = plan_roles(config, lone_plan(config), run_dir, command, RunSecrets())
    return {role.name: role for role in roles}


def test_a_training_run_has_engines_a_manager_and_the_trainer(config, tmp_path):
    roles = roles_of(config, tmp_path)
    assert list(roles) == ["engine-0", "engine-1", "manager", "trainer"]
    assert [role.name for role in roles.values() if role.ends_run] == ["trainer"]
    assert "megatron_matpo.rollout.manager" in roles["manager"].argv
    assert "megatron_matpo.trainer.main" in roles["trainer"].argv
    assert all(str(tmp_path) in roles[name].argv for name in ("manager", "trainer"))


def test_replay_and_sft_need_the_trainer_only(config, tmp_path):
    assert list(roles_of(config, tmp_path, "sft")) == ["trainer"]
    replayed = replace(config, rollout=replace(config.rollout, replay="recorded"))
    assert list(roles_of(replayed, tmp_path)) == ["trainer"]


def test_engines_alone_are_started_anew_unless_nobody_could_give_them_weights(config, tmp_path):
    rollout = replace(config.rollout, max_engine_restarts=5, restart_backoff_s=1.5)
    policy = RestartPolicy(5, 1.5, 60.0, num_peers=2)
    for command in ("train", "eval"):
        roles = roles_of(replace(config, rollout=rollout), tmp_path, command)
        found = {name: role.restarts for name, role in roles.items() if role.restarts}
        assert found == {"engine-0": policy, "engine-1": policy}
    control = replace(config, weight_sync=replace(config.weight_sync, transport="none"))
    restarts = roles_of(control, tmp_path)["engine-0"].restarts
    assert restarts is not None and restarts.max_restarts == 0


def test_a_fresh_engine_is_told_from_one_that_got_weights(config, tmp_path):
    for command, version in (("train", "unpushed"), ("eval", "0")):
        argv = roles_of(config, tmp_path, command)["engine-0"].argv
        assert argv[argv.index("--weight-version") + 1] == version


def test_secrets_go_by_environment_to_those_who_need_them(config, tmp_path, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "serper-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "judge-secret")
    roles = roles_of(config, tmp_path)
    token = roles["manager"].env["MATPO_RUN_TOKEN"]
    assert token == roles["trainer"].env["MATPO_RUN_TOKEN"]
    assert roles["manager"].env["MATPO_ENGINE_KEY"] == roles["trainer"].env["MATPO_ENGINE_KEY"]
    assert token not in repr(roles)
    assert all(token not in " ".join(role.argv) for role in roles.values())
    assert "MATPO_RUN_TOKEN" not in roles["engine-0"].env
    for variable in ("SERPER_API_KEY", "OPENAI_API_KEY"):
        assert [name for name, role in roles.items() if variable in role.env] == ["manager"]
    assert token != roles_of(config, tmp_path)["manager"].env["MATPO_RUN_TOKEN"]


def test_trainer_and_engines_agree_on_what_nccl_wants_alike(config, tmp_path, monkeypatch):
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    assert "NCCL_CUMEM_ENABLE" not in roles_of(config, tmp_path)["trainer"].env
    on_gpus = replace(config, cluster=replace(config.cluster, gpus_per_node=4))

    def found() -> list[str]:
        roles = roles_of(on_gpus, tmp_path)
        return [roles[name].env["NCCL_CUMEM_ENABLE"] for name in ("trainer", "engine-0")]

    assert found() == ["0", "0"]
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    assert found() == ["1", "1"]


def test_a_proxy_never_sees_the_runs_own_traffic(config, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "intranet")
    env = roles_of(config, tmp_path)["trainer"].env
    assert env["NO_PROXY"].split(",") == ["intranet", "127.0.0.1", "127.0.0.1", "localhost"]


class FakeServer(BaseHTTPRequestHandler):
    """Answers each path with a (status, body) of `answers`; needs the bearer token `key`."""

    answers: ClassVar[dict[str, tuple[int, object]]] = {}

    def do_GET(self) -> None:
        status, body = self.answers.get(self.path, (404, {}))
        if self.headers["Authorization"] != "Bearer key":
            status = 401
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch):
    # A proxy of the environment would not know our ports.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({}, False),
        ({"/health": (503, {})}, False),
        ({"/health": (200, {}), "/health_generate": (503, {})}, False),
        ({"/health": (200, {}), "/health_generate": (200, {})}, True),
    ],
)
def test_an_engine_is_ready_when_it_has_generated(url, monkeypatch, answers, expected):
    monkeypatch.setattr(FakeServer, "answers", answers)
    assert engine_generates(url, "key") is expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((200, {"ready": True}), True),
        ((200, {"ready": False}), False),
        ((200, []), False),
        ((500, {"ready": True}), False),
    ],
)
def test_a_manager_is_ready_when_it_says_so(url, monkeypatch, answer, expected):
    monkeypatch.setattr(FakeServer, "answers", {"/health": answer})
    assert manager_is_ready(url, "key") is expected
    assert manager_is_ready(url, "wrong") is False


def test_what_does_not_listen_is_not_ready():
    assert manager_is_ready("http://127.0.0.1:9", "key") is False


def test_the_trainer_is_ready_when_every_rank_has_built_its_model(tmp_path):
    assert not trainer_is_ready(tmp_path, 2)
    PhaseWriter(tmp_path, "trainer", 0).set("load")
    PhaseWriter(tmp_path, "trainer", 1).set("build model")
    assert not trainer_is_ready(tmp_path, 2)
    PhaseWriter(tmp_path, "trainer", 1).set("sync")
    assert trainer_is_ready(tmp_path, 2)


def test_the_plan_gives_the_trainer_its_ranks(config):
    wide = replace(config, parallel=ParallelConfig(tensor=2, data=2))
    assert lone_plan(wide).trainer_ranks_per_node == (4,)
