"""Every recipe for a cluster: its name says what it is, it validates, and its plan fits.

Proved: the naming grammar of recipes/README.md, in both directions; no violation but those of what
no run can do yet; plans that fit, use all GPUs and are those of `golden/`; the table of
recipes/README.md. Not proved: that a machine agrees. No recipe has run on what it names.

After a change that is meant: `python tests/unit/recipes/test_cluster_recipes.py` writes the golden
files and the table anew.
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from megatron_matpo.config import Config, load_recipe
from megatron_matpo.config.load import collect_recipe
from megatron_matpo.config.precision import decide_precision, named_platform
from megatron_matpo.config.tools import McpServerConfig, ToolsConfig
from megatron_matpo.config.validate import collect_violations, collect_warnings
from megatron_matpo.planning.command import Expectation, RunPlan, make_run_plan
from megatron_matpo.planning.engines import engine_gpus
from megatron_matpo.planning.text import as_text

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "recipes"
GOLDEN = Path(__file__).parent / "golden"
README = RECIPES / "README.md"

# For laptop and CI, or bases of that kind: no machine to name. `_` in their names, never `-`.
SMALL = {
    "example_base", "example_calculator", "example_sft", "example_sqlite",
    "quickstart", "quickstart_lora", "quickstart_single_agent",
    "smallworld", "smallworld_sft", "web_search",
}  # fmt: skip
GRAMMAR = re.compile(
    r"(?P<algo>matpo|single|eval)-(?P<model>[a-z0-9.]+(-[a-z0-9.]+)*)"
    r"-(?P<nodes>[1-9]\d*)n(?P<gpus>[1-9]\d*)g-(?P<gpu>[a-z]+\d+)"
    r"(?P<lora>-lora)?(?P<fp8>-fp8)?(-(?P<mode>async|colocated))?"
)
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem not in SMALL)
TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end of the table -->)", re.DOTALL)


@pytest.fixture(autouse=True)
def _in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@cache
def plan(name: str) -> RunPlan:
    return make_run_plan(f"recipes/{name}.yaml", [], Expectation())


def name_of(config: Config) -> str:
    """The name that the grammar gives to a configuration."""
    cluster = config.cluster
    single = "single" if config.rollout.planner == "single_agent" else "matpo"
    words = [
        "eval" if config.is_evaluation else single,
        Path(config.model.path).name,
        f"{cluster.num_nodes}n{cluster.gpus_per_node}g",
        cluster.gpu.split("-")[0].lower(),
        *(["lora"] if config.lora.rank else []),
        *(["fp8"] if decide_precision(config, named_platform(config)).fp8_recipe else []),
        *(["async"] if config.rollout.max_staleness else []),
        *(["colocated"] if cluster.placement == "colocated" else []),
    ]
    return "-".join(words)


def test_the_recipes_are_found():
    assert {path.stem for path in RECIPES.glob("*.yaml")} >= SMALL
    assert len(NAMES) >= 12


@pytest.mark.parametrize("name", NAMES)
def test_the_name_follows_the_grammar_and_says_what_the_recipe_does(name):
    assert GRAMMAR.fullmatch(name)
    config = load_recipe(f"recipes/{name}.yaml", [])
    assert name_of(config) == name
    assert config.run.name == name


@pytest.mark.parametrize(
    "name",
    ["qwen3-14b-16n8g-a800", "matpo-qwen3-14b-16x8-a800", "matpo-qwen3-14b-16n8g-a800-fp8-lora",
     "matpo-qwen3-14b-16n8g-a800-colocated-async", "matpo_qwen3-14b-16n8g-a800"],
)  # fmt: skip
def test_other_names_are_none(name):
    assert GRAMMAR.fullmatch(name) is None


@pytest.mark.parametrize("path", sorted(RECIPES.glob("base/*.yaml")), ids=lambda path: path.stem)
def test_a_base_knows_its_keys_and_some_recipe_builds_on_it(path):
    assert collect_recipe(str(path), [])[1] == []
    users = [*RECIPES.glob("*.yaml"), *RECIPES.glob("base/*.yaml")]
    assert any(f"{path.name}" in user.read_text() for user in users if user != path)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_others_are_valid_and_for_a_cpu(name):
    assert load_recipe(f"recipes/{name}.yaml", []).cluster.device == "cpu"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wrong_but_what_no_run_can_do_yet(name, tmp_path, monkeypatch):
    """With a model folder, an engine environment, a tool server and keys, as on a cluster."""
    config = load_recipe(f"recipes/{name}.yaml", [])
    shutil.copy(Path(config.model.path) / "config.json", tmp_path)
    for file in ("tokenizer.json", "model.safetensors"):
        (tmp_path / file).touch()
    for key in ("SERPER_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(key, "for this test")
    server = McpServerConfig(command="python", env_from=["SERPER_API_KEY"])
    on_cluster = replace(
        config,
        model=replace(config.model, path=str(tmp_path)),
        rollout=replace(config.rollout, python=sys.executable),
        tools=replace(config.tools, servers={"search_and_scrape_webpage": server}),
    )
    assert isinstance(on_cluster.tools, ToolsConfig)
    command = "eval" if config.is_evaluation else "train"
    found = {problem.split("=")[0] for problem in collect_violations(on_cluster, command=command)}
    expected = {"cluster.placement"} if config.cluster.placement == "colocated" else set()
    assert found == expected
    assert collect_warnings(on_cluster, command=command) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_fits_and_uses_every_gpu(name):
    said = plan(name)
    cluster = said.config.cluster
    gpus = cluster.num_nodes * cluster.gpus_per_node
    assert said.problems == ()
    assert said.engine is not None
    assert said.engine.full_trajectories >= 4
    engines = engine_gpus(said.config)
    if said.own is None:
        assert engines == gpus
        return
    ranks = said.own.layout.world_size
    if cluster.placement == "colocated":
        assert ranks == engines == gpus
        assert [phase.name for phase in said.phases] == ["train", "push", "rollout"]
    else:
        assert ranks + engines == gpus
        # A node trains or generates, unless there is only one.
        assert cluster.num_nodes == 1 or ranks % cluster.gpus_per_node == 0
    assert said.own.peak <= 0.92 * said.memory
    # Neither ranks without work nor thousands of tiny pieces.
    assert 4 <= said.own.num_micro_batches <= 512


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_is_the_golden_one(name):
    file = GOLDEN / f"{name}.txt"
    assert file.is_file(), f"no golden plan; write it with: python {Path(__file__).name}"
    assert as_text(plan(name)) == file.read_text(encoding="utf-8")


def test_no_golden_plan_without_a_recipe():
    assert sorted(file.stem for file in GOLDEN.glob("*.txt")) == NAMES


def test_the_table_is_current():
    (found,) = TABLE.findall(README.read_text(encoding="utf-8"))
    assert found == table()


def test_single_agent_and_matpo_differ_in_what_they_compare():
    """The baseline has the same model, machine and optimizer."""
    pairs = [(name, name.replace("single-", "matpo-", 1)) for name in NAMES if "single-" in name]
    assert len(pairs) >= 4
    for single, matpo in pairs:
        left, right = plan(single).config, plan(matpo).config
        for section in ("cluster", "parallel", "optim", "algo", "train", "precision", "reward"):
            assert getattr(left, section) == getattr(right, section), section
        assert left.data.prompts_per_step == right.data.prompts_per_step
        assert left.data.samples_per_prompt == right.data.samples_per_prompt


ORIGINAL: dict[str, dict[str, object]] = {
    # What the original's scripts say (examples/sglang_multiturn at 3c41d62), by recipe.
    "matpo-qwen3-14b-16n8g-a800": {"prompts_per_step": 256, "samples_per_prompt": 8, "tensor": 2},
    "single-qwen3-14b-16n8g-a800": {"prompts_per_step": 256, "samples_per_prompt": 8, "tensor": 2},
    "matpo-qwen3-4b-1n8g-a800": {"prompts_per_step": 8, "samples_per_prompt": 2},
    "single-qwen3-4b-1n8g-a800": {"prompts_per_step": 8, "samples_per_prompt": 2},
    "matpo-qwen3-4b-1n8g-a800-lora": {"prompts_per_step": 8, "samples_per_prompt": 2, "rank": 32},
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_values_are_the_original_s(name):
    config = load_recipe(f"recipes/{name}.yaml", [])
    optim, algo, rollout, agents = config.optim, config.algo, config.rollout, config.agents
    values = {
        "prompts_per_step": config.data.prompts_per_step,
        "samples_per_prompt": config.data.samples_per_prompt,
        "tensor": rollout.tensor,
        "rank": config.lora.rank,
    }
    assert {key: values[key] for key in ORIGINAL[name]} == ORIGINAL[name]
    assert (optim.lr, optim.schedule, optim.warmup_steps) == (1e-5, "constant", 0)
    assert (optim.beta1, optim.beta2, optim.weight_decay) == (0.9, 0.999, 0.01)
    assert (optim.clip_grad, algo.kl_coef, algo.aggregation) == (1.0, 0.0, "token")
    assert (algo.clip_low, algo.clip_high, algo.dual_clip) == (0.2, 0.2, 3.0)
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (1.0, 1.0, -1)
    assert rollout.context_length == config.train.micro_batch_tokens == 3072 + 37888
    assert {(agent.max_turns, agent.summary_reserve_tokens) for agent in agents.values()} == {
        (20, 4096)
    }
    assert (config.reward.accuracy_weight, config.reward.format_weight) == (0.9, 0.1)
    assert config.tools.result_max_chars == 20000
    assert config.eval.before_train == name.startswith("single-qwen3-14b")


def table() -> str:
    """The table of recipes/README.md."""
    lines = [
        "| recipe | model | trainer | engines x GPUs | GiB per GPU: trainer, engine, of | status |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(row(name) for name in NAMES)]) + "\n"


def row(name: str) -> str:
    said = plan(name)
    config, engine, gpu = said.config, said.engine, said.gpu
    assert engine is not None
    assert gpu is not None
    trainer, peak = "-", "-"
    if said.own:
        layout = said.own.layout
        expert = f", EP {layout.expert}" if layout.expert > 1 else ""
        trainer = (
            f"TP {layout.tensor}, PP {layout.pipeline}, CP {layout.context}, DP {layout.data}"
            f"{expert}; {said.own.num_micro_batches} micro-batches"
        )
        peak = f"{said.own.peak / 2**30:.1f}"
    serving = (engine.weights + engine.kv_cache) / 2**30
    memory = f"{peak}, {serving:.1f}, {gpu.memory_gib:.1f}"
    if config.cluster.placement == "colocated":
        memory = f"{peak} together, of {gpu.memory_gib:.1f}"
    only_planned = config.cluster.placement == "colocated"
    status = "planned; refused by `matpo train` so far" if only_planned else "never run there"
    return (
        f"| `{name}` | {Path(config.model.path).name} | {trainer} | "
        f"{config.rollout.num_servers} x {config.rollout.tensor} | {memory} | {status} |"
    )


def write_anew() -> None:
    """Golden files and table."""
    for file in GOLDEN.glob("*.txt"):
        file.unlink()
    for name in NAMES:
        (GOLDEN / f"{name}.txt").write_text(as_text(plan(name)), encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    README.write_text(TABLE.sub(lambda _: table(), text), encoding="utf-8")


if __name__ == "__main__":
    import os

    os.chdir(ROOT)
    write_anew()
