"""`matpo plan`: what it prints, what it flags, what it refuses, and that it needs no torch.

The numbers behind it: `test_ledger_golden.py`, `tests/dist/test_ledger.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_matpo.__main__ import main

ROOT = Path(__file__).parents[3]
RECIPE = str(ROOT / "recipes" / "matpo-qwen3-14b-16n8g-a800.yaml")


@pytest.fixture(autouse=True)
def _in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["plan", RECIPE, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_text_and_json_agree(capsys):
    said = plan(capsys)
    assert main(["plan", RECIPE]) == 0
    text = capsys.readouterr().out
    assert f"{said['worst_stage']['total'] / 2**30:.1f}" in text
    assert said["assumption"] in text
    assert f"{said['micro_batches']} micro-batches of at most 40960 tokens" in text
    assert said["precision"]["reason"] in text
    assert "\nfits\n" in text


def test_what_does_not_fit_is_flagged_and_what_does_is_proposed(capsys):
    said = plan(
        capsys, "cluster.gpu=A800-80G", "parallel.context=1", "parallel.data=16",
        "parallel.tensor=1", "parallel.data=64", "parallel.sequence=false",
    )  # fmt: skip
    (problem,) = said["problems"]
    assert problem.startswith("trainer: ")
    assert problem.endswith("GiB on stage 0; A800-80G has 79.3")
    memory = said["gpu"]["memory_gib"] * 2**30
    assert said["worst_stage"]["total"] > memory
    assert said["proposals"]
    for item in said["proposals"]:
        assert item["total"] <= memory
        layout = item["layout"]
        assert layout["tensor"] * layout["pipeline"] * layout["context"] * layout["data"] == 64
        assert layout["tensor"] <= 8


def test_a_proposal_taken_as_overrides_gives_its_own_numbers(capsys):
    first = plan(capsys)["proposals"][0]
    layout = first["layout"]
    again = plan(
        capsys,
        *(f"parallel.{key}={layout[key]}" for key in ("tensor", "pipeline", "context", "data")),
        f"parallel.sequence={layout['sequence']}",
        f"train.recompute={layout['recompute']}",
        f"optim.offload={layout['offload']}",
    )
    assert again["worst_stage"]["total"] == first["total"]
    assert again["micro_batches"] == first["micro_batches"]
    assert again["proposals"][0]["layout"] == layout


def test_too_many_ranks_and_an_engine_without_room(capsys):
    said = plan(capsys, "parallel.data=16", "rollout.tensor=1", "rollout.mem_fraction=0.34")
    trainer, engine = said["problems"]
    assert trainer.startswith("parallel: 128 trainer ranks, but the engines leave 96 of 16 x 8")
    assert engine.startswith("engine: room for 0 tokens")


def test_lengths_of_a_file_are_packed(capsys, tmp_path):
    file = tmp_path / "lengths.txt"
    file.write_text("40960\n20480\n20480\n")
    overrides = ("data.prompts_per_step=6", "data.samples_per_prompt=1")
    said = plan(capsys, *overrides, "rollout.planner=single_agent", "--lengths", str(file))
    # Two of each: two full ones, and two pairs of halves, over 8 ranks.
    assert said["micro_batches"] == 1
    assert "3 lengths from" in said["assumption"]
    fewer = plan(
        capsys, *overrides, "rollout.planner=single_agent", "parallel.data=1",
        "parallel.pipeline=8", "--lengths", str(file),
    )  # fmt: skip
    assert fewer["micro_batches"] == 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["cluster.gpu=A800"], "did you mean A800-80G?"),
        (["cluster.gpu=A800-80G", "precision=fp8"], "A800-80G (sm_80) has no FP8"),
        (["model.path="], "expected a folder with the model's config.json"),
        (["parallel.tensor=3"], "does not divide 40 attention heads"),
        (["--mean-tokens", "50000"], "more than rollout.context_length=40960"),
        (["--lengths", "nowhere.txt"], "--lengths=nowhere.txt: expected one whole number"),
    ],
)
def test_refusals(capsys, arguments, expected):
    assert main(["plan", RECIPE, *arguments]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["quickstart.yaml", "quickstart_single_agent.yaml"])
def test_a_cpu_recipe_is_planned_too(capsys, recipe):
    assert main(["plan", str(ROOT / "recipes" / recipe)]) == 0
    text = capsys.readouterr().out
    assert "fp32: the CPU platform" in text
    assert "MiB per rank" in text


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from megatron_matpo.__main__ import main; "
        f"assert main(['plan', {RECIPE!r}]) == 0; "
        "heavy = {'torch', 'megatron', 'numpy', 'pyarrow'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
