"""Proves what users meet when they write recipes and overrides: merging, errors, suggestions."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_matpo.config import Config, dump_config, load_recipe, load_resolved
from megatron_matpo.config.agents import AgentConfig
from megatron_matpo.config.load import diff_configs
from megatron_matpo.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write_recipe(text: str, name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write_recipe


def problems_of(recipe: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, list(overrides))
    return str(caught.value).splitlines()


def test_an_empty_recipe_is_the_defaults(write):
    assert load_recipe(write("{}"), []) == Config()


def test_values_are_typed_and_the_result_is_frozen(write):
    recipe = write(
        """
        run: {name: demo}
        optim: {lr: 1e-5}
        agents:
          main_agent: {role: planner, tools: [browser]}
        """
    )
    config = load_recipe(recipe, [])
    assert config.optim.lr == 1e-5
    assert config.agents == {"main_agent": AgentConfig(role="planner", tools=["browser"])}
    with pytest.raises(AttributeError):
        config.run.name = "other"  # type: ignore[misc]


def test_bases_chain_relative_to_their_file_and_the_nearest_wins(write):
    write("{run: {steps: 1, seed: 7}, agents: {a: {max_turns: 3}}}", "lib/root.yaml")
    write("{base: root.yaml, run: {steps: 2}}", "lib/middle.yaml")
    recipe = write("{base: lib/middle.yaml, agents: {a: {max_tokens_per_turn: 9}}}")
    config = load_recipe(recipe, [])
    assert (config.run.steps, config.run.seed) == (2, 7)
    assert config.agents["a"] == AgentConfig(max_turns=3, max_tokens_per_turn=9)


def test_of_several_bases_the_last_wins_and_a_shared_one_counts_once(write):
    write("{run: {steps: 1, seed: 1, name: root, dir: root}}", "root.yaml")
    write("{base: root.yaml, run: {steps: 2, seed: 2, name: left}}", "left.yaml")
    write("{base: root.yaml, run: {steps: 3}}", "right.yaml")
    recipe = write("{base: [left.yaml, right.yaml], run: {name: own}}")
    run = load_recipe(recipe, []).run
    # `root` is below both: what `left` says is not undone because `right` has the same base.
    assert (run.steps, run.seed, run.name, run.dir) == (3, 2, "own", "root")


@pytest.mark.parametrize("base", ["a.yaml", "[root.yaml, a.yaml]"])
def test_a_circle_of_bases_is_refused(write, base):
    write("{}", "root.yaml")
    write("{base: [root.yaml, b.yaml]}", "a.yaml")
    recipe = write(f"{{base: {base}}}", "b.yaml")
    (line,) = problems_of(recipe)
    assert "circle" in line
    assert "a.yaml" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{base: nowhere.yaml}", "nowhere.yaml: no such recipe file (base of"),
        ("{base: [a, 3]}", "expected the path of a recipe, or a list of them"),
        ("{base: []}", "expected the path of a recipe, or a list of them"),
        ("{base: {a: b}}", "expected the path of a recipe, or a list of them"),
        ("- a\n- b\n", "expected a mapping of sections"),
        ("run: {steps: [}", "not valid YAML"),
        ("run: {steps: 1, steps: 2}", "not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(write, text, expected):
    recipe = write(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, [])
    assert expected in str(caught.value)
    assert str(Path(recipe).parent) in str(caught.value)


def test_a_missing_recipe_is_named():
    assert problems_of("no/such.yaml") == ["no/such.yaml: no such recipe file"]


def test_overrides_have_yaml_values_and_the_last_one_wins(write):
    recipe = write("{agents: {a: {tools: [x]}}, rollout: {engine_args: [a]}}")
    overrides = [
        "agents.a.tools=[search, browser]",
        "agents.b.role=planner",
        "optim.lr=1e-4",
        "reward.gate_format=true",
        "rollout.engine_args=[]",
        "run.steps=5",
        "run.steps=6",
        "run.name=2024",
        "data.folder=",
        "agents.a.user_template=a=b",
    ]
    config = load_recipe(recipe, overrides)
    assert config.agents["a"].tools == ["search", "browser"]
    assert config.agents["a"].user_template == "a=b"
    assert config.agents["b"].role == "planner"
    assert config.optim.lr == 1e-4
    assert config.reward.gate_format is True
    assert config.rollout.engine_args == []
    assert (config.run.steps, config.run.name, config.data.folder) == (6, "2024", "")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.num_server=2", "no such key; did you mean rollout.num_servers?"),
        ("rolout.num_servers=2", "no such key; did you mean rollout.num_servers?"),
        ("rolout.tensr=2", "no such key; did you mean rollout.tensor?"),
        ("num_servers=2", "no such key; did you mean rollout.num_servers?"),
        ("agents.a.max_turn=2", "no such key; did you mean agents.a.max_turns?"),
        ("train.lr=2", "no such key; did you mean optim.lr?"),
        ("zzz=2", "no such key; the sections are agents, algo,"),
        ("run.zzz=2", "no such key; run has dir, name,"),
        ("run.steps=two", "expected a whole number"),
        ("run.steps=1.5", "expected a whole number"),
        ("run.steps=true", "expected a whole number"),
        ("run.steps=null", "expected a whole number"),
        ("run.steps=[1]", "expected a whole number"),
        ("optim.lr=fast", "expected a finite number"),
        ("optim.lr=.inf", "expected a finite number"),
        ("optim.lr=.nan", "expected a finite number"),
        ("reward.gate_format=2", "expected true or false"),
        ("run.name=[a]", "expected text"),
        ("rollout.engine_args=abc", "expected a list of str, as in [a, b]"),
        ("run=3", "expected a mapping with keys such as name,"),
        ("agents=3", "expected a mapping of names"),
        ("agents.a=3", "expected a mapping with keys such as role,"),
        ("run.name=${oc.env:HOME}", "resolvers such as ${oc.env:...} are not allowed"),
        ("precision=fp4", "expected one of auto, fp32, bf16"),
        ("precision=fp8", "the CPU platform (cluster.gpus_per_node=0) has no FP8; use auto, fp32"),
        ("fp8.recipe=fp6", "expected one of auto, mxfp8, blockwise, tensorwise, delayed"),
        ("train.recompute=some", "expected one of none, selective, full"),
        ("cluster.gpu=A800", "expected one of A100-80G, A800-80G, H100-80G, H800-80G, H200-141G"),
        ("cluster.gpu=h80-80g", "did you mean H800-80G?"),
        ("parallel.virtual=0", "must be at least 1"),
        ("reward.grader=luck", "expected one of exact_match, f1, numeric"),
        ("weight_sync.transport=pigeon", "expected one of auto, broadcast, ipc, disk, none"),
        ("algo.old_logprobs=x", "expected one of trainer, engine"),
        ("obs.wandb_mode=x", "expected one of auto, online, offline, disabled"),
        ("agents.a.role=boss", "expected one of planner, worker"),
        ("agents.a.final_summary=x", "expected one of auto, always, on_overflow, never"),
        ("run.steps=0", "must be at least 1"),
        ("parallel.tensor=0", "must be at least 1"),
        ("rollout.temperature=0", "must be greater than 0"),
        ("rollout.top_p=0", "must be greater than 0 and at most 1"),
        ("rollout.top_k=0", "-1 (off) or at least 1"),
        ("cluster.placement=x", "expected one of disaggregated, colocated"),
        ("parallel.expert=2", "must divide tensor x context x data = 1"),
        ("parallel.virtual=0", "must be at least 1"),
        ("run.name=../x", "a folder name of letters"),
    ],
)
def test_a_wrong_value_names_path_value_and_what_is_allowed(write, override, expected):
    lines = problems_of(write("{}"), override)
    assert len(lines) == 1
    assert lines[0].startswith(override.replace("null", "null").split("=")[0])
    assert expected in lines[0]


@pytest.mark.parametrize("override", ["run.steps", "=3", "a b=3", "run..steps=3"])
def test_what_is_not_an_override_is_refused(write, override):
    (line,) = problems_of(write("{}"), override)
    assert line == f"{override}: not an override; expected dotted.key=value"


def test_all_violations_are_reported_together(write):
    recipe = write("{rollout: {num_server: 2, tensor: x}, optim: {lr: abc}}")
    lines = problems_of(recipe, "precision=fp4", "run.step=3", "run.steps=0", "nonsense")
    starts = [line.split("=")[0].split(":")[0] for line in lines]
    assert sorted(starts) == [
        "nonsense",
        "optim.lr",
        "precision",
        "rollout.num_server",
        "rollout.tensor",
        "run.step",
        "run.steps",
    ]
    assert all(recipe in line for line in lines if line.startswith(("rollout", "optim")))


def test_references_to_other_values_are_resolved(write):
    recipe = write("{run: {name: demo}, sft: {export: 'models/${run.name}'}}")
    assert load_recipe(recipe, []).sft.export == "models/demo"
    lines = problems_of(write("{run: {name: '${nowhere.x}'}}"))
    assert "nowhere" in lines[0]


def test_a_secret_in_the_recipe_is_refused_without_being_shown(write):
    recipe = write("{tools: {servers: {s: {command: npx, env: {SERPER_API_KEY: abc123}}}}}")
    (line,) = problems_of(recipe)
    assert "tools.servers.s.env_from" in line
    assert "abc123" not in line


def test_what_is_dumped_is_read_back_unchanged(write, tmp_path):
    recipe = write(
        """
        agents:
          a:
            role: planner
            tools: [x]
            system_prompt: "1e-5"
            user_template: |
              two lines:
                - "quoted" 'twice' # no comment
        tools: {servers: {x: {command: python, args: ["-m", "y", "1"], env: {A: "true"}}}}
        optim: {lr: 3e-7}
        """
    )
    config = load_recipe(recipe, [])
    resolved = tmp_path / "config.yaml"
    resolved.write_text(dump_config(config))
    assert load_resolved(str(resolved)) == config


def test_differences_are_named_by_dotted_path(write):
    old = load_recipe(write("{agents: {a: {tools: [x]}}}"), [])
    new = load_recipe(write("{agents: {a: {tools: [y]}}, run: {steps: 3}}"), [])
    assert diff_configs(old, new) == {"agents.a.tools": (["x"], ["y"]), "run.steps": (100, 3)}


def test_the_configuration_is_readable_without_heavy_packages():
    code = (
        "import sys; import megatron_matpo.config, megatron_matpo.config.validate, "
        "megatron_matpo.config.plan, megatron_matpo.launch.run, megatron_matpo.__main__; "
        "heavy = {'torch', 'megatron', 'sglang', 'nemo_run', 'transformers', 'pyarrow'}; "
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "[]", done.stderr
