"""Proves the checks across sections and against the files of this machine.

The model folder is a `config.json` and empty files: what the weights hold is not looked at.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from megatron_matpo.config import Config
from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.config.run import ClusterConfig
from megatron_matpo.config.tools import McpServerConfig, ToolsConfig
from megatron_matpo.config.train import ModelConfig
from megatron_matpo.config.validate import check_values, collect_violations, collect_warnings
from tests.helpers.model_folder import write_model_folder


@pytest.fixture
def config(tmp_path) -> Config:
    """A configuration without violations."""
    write_model_folder(tmp_path)
    base = Config()
    return replace(
        base,
        model=ModelConfig(path=str(tmp_path)),
        rollout=replace(base.rollout, planner="main_agent", python=sys.executable),
        agents={
            "main_agent": AgentConfig(role="planner", tools=["browser_agent"]),
            "browser_agent": AgentConfig(tools=["search"]),
        },
        tools=ToolsConfig({"search": McpServerConfig(command="python")}),
    )


def section(config: Config, name: str, **values) -> Config:
    return replace(config, **{name: replace(getattr(config, name), **values)})


def test_stale_tokens_need_a_correction(config):
    stale = section(config, "rollout", max_staleness=1)
    (problem,) = collect_violations(stale, command="train")
    assert problem.startswith("algo.tis=off: with rollout.max_staleness=1 tokens were sampled by")
    for algo in ({"tis": "truncate"}, {"tis": "mask"}, {"old_logprobs": "engine"}):
        assert collect_violations(section(stale, "algo", **algo), command="train") == []
    assert collect_violations(stale, command="eval") == []
    assert check_values(stale) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"cluster": {"placement": "colocated"}},
            "rollout.max_staleness=2: with cluster.placement",
        ),
        ({"weight_sync": {"transport": "none"}}, "rollout.max_staleness=2: with weight_sync"),
        ({"rollout": {"on_stale": "keep"}}, "rollout.on_stale=keep: expected one of wait, refresh"),
        ({"rollout": {"router": "slime"}}, "rollout.router=slime: expected one of builtin, sglang"),
        ({"rollout": {"on_update": "abort"}}, "rollout.on_update=abort: expected one of retract"),
        ({"rollout": {"over_sample": 5.0}}, "rollout.over_sample=5.0: must be at least 0 and at"),
    ],
)
def test_what_an_asynchronous_run_cannot_have(config, values, message):
    stale = section(section(config, "rollout", max_staleness=2), "algo", tis="truncate")
    for name, fields in values.items():
        stale = section(stale, name, **fields)
    problems = [*collect_violations(stale, command="train"), *check_values(stale)]
    assert any(problem.startswith(message) for problem in problems)


def test_a_good_configuration_passes(config):
    assert collect_violations(config, command="train") == []
    assert collect_violations(config, command="sft") == []


def test_all_violations_come_together(config):
    bad = section(section(config, "run", steps=0), "rollout", planner="nobody")
    assert collect_violations(bad, command="train") == [
        "run.steps=0: must be at least 1",
        "rollout.planner=nobody: no such agent; planner agents: main_agent",
    ]


def test_steps_between_traces_are_not_negative(config):
    (line,) = check_values(section(config, "obs", trace_every=-1))
    assert line == "obs.trace_every=-1: must be at least 0"


def test_a_worker_cannot_be_the_planner(config):
    (line,) = collect_violations(
        section(config, "rollout", planner="browser_agent"), command="train"
    )
    assert line.startswith("rollout.planner=browser_agent: its role is worker")


@pytest.mark.parametrize(
    ("agent", "tools", "expected"),
    [
        ("main_agent", ["serch"], "agents.main_agent.tools=serch: no such tool server"),
        ("browser_agent", ["main_agent"], "only a planner may call agents"),
        ("main_agent", ["main_agent"], "only workers can be called"),
        ("main_agent", ["browser_agent"] * 2, "browser_agent more than once"),
    ],
)
def test_tools_must_exist(config, agent, tools, expected):
    agents = {**config.agents, agent: replace(config.agents[agent], tools=tools)}
    (line,) = collect_violations(replace(config, agents=agents), command="train")
    assert expected in line


def test_workers_of_one_planner_need_names_of_their_own(config):
    agents = {
        **config.agents,
        "main_agent": AgentConfig(role="planner", tools=["browser_agent", "second"]),
        "second": AgentConfig(tools=["search"]),
    }
    (line,) = collect_violations(replace(config, agents=agents), command="train")
    assert "share a tool_name" in line


def test_the_model_folder_must_be_complete(config, tmp_path):
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    (line,) = collect_violations(config, command="train")
    assert line.endswith("the folder lacks tokenizer.json, *.safetensors")
    fresh = section(config, "model", random_init=True)
    (line,) = collect_violations(fresh, command="sft")
    assert line.endswith("the folder lacks tokenizer.json")


@pytest.mark.parametrize("path", ["", "no/such/folder"])
def test_the_model_folder_must_exist(config, path):
    (line,) = collect_violations(section(config, "model", path=path), command="train")
    assert line.startswith(f"model.path={path}:")


def test_random_weights_are_for_sft(config):
    fresh = section(config, "model", random_init=True)
    assert collect_violations(fresh, command="sft") == []
    (line,) = collect_violations(fresh, command="train")
    assert line.startswith("model.random_init=true: only for `matpo sft`")


def test_the_layout_must_divide_the_model(config):
    lines = collect_violations(section(config, "parallel", tensor=3), command="train")
    assert lines
    assert all(line.startswith("parallel.tensor=3") for line in lines)


def test_trainer_and_engines_must_fit_on_the_gpus(config):
    gpu = replace(config, cluster=ClusterConfig(gpus_per_node=4))
    gpu = section(section(gpu, "parallel", tensor=2, data=2), "rollout", num_servers=1)
    (line,) = collect_violations(gpu, command="train")
    assert line == (
        "rollout.num_servers=1: only 0 engines of rollout.tensor=1 GPUs fit on cluster.num_nodes=1 "
        "x cluster.gpus_per_node=4 beside 4 trainer ranks (parallel.*)"
    )
    assert collect_violations(gpu, command="sft") == []


def test_updates_cannot_exceed_the_episodes_of_a_step(config):
    bad = section(
        section(config, "data", prompts_per_step=1, samples_per_prompt=2),
        "algo",
        updates_per_step=3,
    )
    (line,) = collect_violations(bad, command="train")
    assert line.startswith("algo.updates_per_step=3: must be at most")


def test_a_turn_must_fit_into_the_context(config):
    lines = collect_violations(section(config, "rollout", context_length=4096), command="train")
    assert any("agents.main_agent.max_tokens_per_turn=4096" in line for line in lines)


def test_programs_and_variables_must_be_there(config, monkeypatch):
    monkeypatch.delenv("MATPO_TEST_KEY", raising=False)
    server = McpServerConfig(command="no-such-program", env_from=["MATPO_TEST_KEY"])
    bad = replace(config, tools=ToolsConfig({"search": server}))
    bad = section(bad, "rollout", python="no/python")
    lines = collect_violations(bad, command="train")
    assert len(lines) == 3
    assert lines[0].startswith("rollout.python=no/python: no such program; `make setup`")
    assert lines[1] == "tools.servers.search.command=no-such-program: no such program on PATH"
    assert lines[2].startswith("tools.servers.search.env_from=MATPO_TEST_KEY")
    assert collect_violations(bad, command="sft") == []


def test_replay_needs_its_folder_and_no_engines(config, tmp_path):
    replayed = section(config, "rollout", replay="no/folder", python="no/python", planner="x")
    (line,) = collect_violations(replayed, command="train")
    assert line == "rollout.replay=no/folder: no such folder"
    replayed = section(replayed, "rollout", replay=str(tmp_path))
    assert collect_violations(replayed, command="train") == []


def test_settings_that_cannot_learn_are_warned_about(config):
    lone = section(section(config, "data", samples_per_prompt=1), "algo", advantage_scale=0.0)
    lone = section(lone, "weight_sync", transport="none")
    assert [text.split("=")[0] for text in collect_warnings(lone, command="train")] == [
        "data.samples_per_prompt",
        "algo.advantage_scale",
        "weight_sync.transport",
    ]
    assert collect_warnings(config, command="train") == []


def test_a_missing_node_is_named_with_the_command_that_installs_it(config, monkeypatch):
    server = McpServerConfig(command="npx")
    monkeypatch.setenv("PATH", "")
    bad = replace(config, tools=ToolsConfig({"search": server}))
    (line,) = collect_violations(bad, command="train")
    assert line.startswith(
        "tools.servers.search.command=npx: no such program on PATH; install Node"
    )
    assert "apt-get install nodejs npm" in line


def test_bf16_layers_of_an_fp8_run_fit_into_a_stage(config):
    (line,) = collect_violations(section(config, "fp8", first_last_layers_bf16=5), command="train")
    assert "fp8.first_last_layers_bf16=5: must be at most 4" in line
