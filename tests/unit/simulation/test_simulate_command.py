"""`matpo simulate`: what it prints, what it refuses, that it is quick and repeats itself."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_matpo.__main__ import main
from megatron_matpo.simulation.episodes import Agent, Turn
from tests.helpers.simulated_runs import QUICKSTART, write_step

ROOT = Path(__file__).parents[3]
RECIPE = str(ROOT / "recipes" / "matpo-qwen3-14b-16n8g-a800.yaml")
SMALL = ("data.prompts_per_step=16", "--steps", "1")


@pytest.fixture(autouse=True)
def _in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def simulated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["simulate", RECIPE, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_text_and_json_agree(capsys):
    said = simulated(capsys, *SMALL)
    assert main(["simulate", RECIPE, *SMALL]) == 0
    text = capsys.readouterr().out
    names = [item["placement"] for item in said["placements"]]
    assert names == ["disaggregated", "asynchronous", "colocated"]
    for item in said["placements"]:
        (row,) = [line for line in text.splitlines() if line.lstrip("* ").startswith(
            item["placement"] + " ")]  # fmt: skip
        assert f"{item['step_s']:.1f}" in row
        assert f"{100 * item['engines_busy']:.0f}%" in row
    assert said["source"] in text
    assert "not measured by this project" in text


def test_every_second_of_a_step_is_in_one_column(capsys):
    keys = ("rollout", "score", "train", "sync", "checkpoint", "switch", "other")
    for item in simulated(capsys, *SMALL, "algo.updates_per_step=2")["placements"]:
        assert sum(item[f"{key}_s"] for key in keys) == pytest.approx(item["step_s"])
        assert item["rollout_s"] >= 0 and item["score_s"] > 0
        times = item["rollout"]
        if times:
            parts = sum(times[f"{key}_s"] for key in ("decode", "prefill", "wait", "tail"))
            assert parts == pytest.approx(item["rollout_s"])
    assert item["num_engines"] == 64 and item["num_trainer_ranks"] == 128


def test_the_seed_decides(capsys):
    first = simulated(capsys, *SMALL)
    assert simulated(capsys, *SMALL) == first
    assert simulated(capsys, *SMALL, "run.seed=2")["placements"] != first["placements"]


def test_faster_machines_are_faster(capsys):
    a800 = simulated(capsys, *SMALL, "cluster.gpu=A800-80G")["placements"]
    h800 = simulated(capsys, *SMALL, "cluster.gpu=H800-80G")["placements"]
    for slow, fast in zip(a800, h800, strict=True):
        assert fast["train_s"] < slow["train_s"]
        assert fast["rollout_s"] < slow["rollout_s"]


def test_a_colocated_recipe_comes_first(capsys):
    recipe = RECIPE.replace(".yaml", "-colocated.yaml")
    assert main(["simulate", recipe, "--json", *SMALL]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["placements"][0]["placement"] == "colocated"
    assert said["placements"][1]["num_engines"] == 32
    assert "half of the devices" in said["warnings"][0]


def test_recorded_lengths_are_drawn_from(capsys, tmp_path):
    write_step(tmp_path, 1, [Agent(700, (Turn(90, (0.5,), (), 300), Turn(10)))], [1.0])
    file = tmp_path / "rollouts" / "step_000001.jsonl"
    for path in (tmp_path, file):
        said = simulated(capsys, *SMALL, "--lengths", str(path))
        assert said["tokens_per_context"] == 1100
        assert said["sampled_per_episode"] == 100
        assert "1 recorded episodes" in said["lengths"]


def test_rates_are_saved_and_taken_again(capsys, tmp_path):
    file = str(tmp_path / "rates.yaml")
    first = simulated(capsys, *SMALL, "--save-rates", file)
    again = simulated(capsys, *SMALL, "--rates", file)
    for one, two in zip(first["placements"], again["placements"], strict=True):
        assert two["step_s"] == pytest.approx(one["step_s"], rel=1e-3)


def test_deadlines_and_a_small_cache_are_noted(capsys):
    said = simulated(
        capsys, "data.prompts_per_step=64", "--steps", "1", "rollout.episode_timeout_s=20",
        "rollout.num_servers=1", "rollout.tensor=1", "rollout.step_timeout_s=650",
    )  # fmt: skip
    text = "\n".join(said["warnings"])
    assert "rollout.episode_timeout_s is 20" in text
    assert "rollout.step_timeout_s is 650" in text
    assert "lower cache.prefix_hit" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["cluster.gpu=A100-80G"], "no rates of it come with the package"),
        (["cluster.gpu="], "no rates of it come with the package"),
        (["cluster.gpu=A800"], "did you mean A800-80G?"),
        (["model.path="], "expected a folder with the model's config.json"),
        (["parallel.data=64"], "more than the 128 of the recipe"),
        (
            ["rollout.tensor=1", "rollout.mem_fraction=0.36", "rollout.num_servers=4"],
            "the recipe does not fit:\nengine: room for",
        ),
        (["--rates", "nowhere.yaml"], "--rates=nowhere.yaml: expected a YAML file"),
        (["--lengths", "nowhere"], "--lengths=nowhere: expected a run's folder"),
        (["--lengths", "nowhere.yaml"], "--lengths=nowhere.yaml: expected a YAML file"),
        (["--from-run", "nowhere"], "--from-run=nowhere: no run's folder"),
        (["--fit-steps", "2-4"], "--fit-steps: only with --from-run"),
        (["--fit-steps", "4-2"], "--fit-steps=4-2: expected first and last step"),
        (["--steps", "0"], "--steps=0: must be at least 1"),
        (["--staleness", "-1"], "--staleness=-1: must be at least 1"),
        (["--save-rates", "nowhere/rates.yaml", *SMALL], "--save-rates=nowhere/rates.yaml: "),
    ],
)
def test_refusals(capsys, arguments, expected):
    assert main(["simulate", RECIPE, *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_a_context_longer_than_the_recipes_is_refused(capsys, tmp_path):
    write_step(tmp_path, 1, [Agent(40_000, (Turn(2_000),))], [1.0])
    assert main(["simulate", RECIPE, *SMALL, "--lengths", str(tmp_path)]) == 2
    assert "a recorded context has 42000 tokens" in capsys.readouterr().err


def test_a_cpu_without_rates_names_the_way_to_them(capsys, tmp_path):
    assert main(["simulate", str(ROOT / "recipes" / "example_calculator.yaml")]) == 2
    assert "--from-run RUN_DIR" in capsys.readouterr().err


def test_the_quickstart_has_rates_of_its_own(capsys, tmp_path):
    write_step(tmp_path, 1, [Agent(20, (Turn(6, (0.02,), (), 30), Turn(4)))], [1.0])
    assert main(["simulate", QUICKSTART, "--json", "--lengths", str(tmp_path)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["source"].startswith("measured on two CPU cores")
    assert [item["placement"] for item in said["placements"]] == ["disaggregated", "asynchronous"]


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from megatron_matpo.__main__ import main; "
        f"assert main(['simulate', {RECIPE!r}, 'data.prompts_per_step=4', '--steps', '1']) == 0; "
        "heavy = {'torch', 'megatron', 'numpy', 'pyarrow'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_a_step_of_the_papers_size_is_simulated(capsys):
    """2,048 episodes of up to 20 turns; the clock is printed, not judged (docs/simulate.md)."""
    start = time.perf_counter()
    said = simulated(capsys, "--steps", "1")
    print(f"{time.perf_counter() - start:.1f} s")
    assert said["episodes"] == 2048
    assert said["generations_per_episode"] * 2048 > 20_000
