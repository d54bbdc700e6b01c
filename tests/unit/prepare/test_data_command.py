"""Proves `matpo data`: exit codes, reports, prompts from real tool servers, deterministic results.

The recipe's MCP server is the bundled corpus server, which offers Serper's tools; it is started for
real. Tokens are counted with the small world's tokenizer.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_matpo.__main__ import main
from megatron_matpo.data.dataset import read_questions
from megatron_matpo.data.schema import CONFIGS
from tests.helpers.matpo import ROOT
from tests.unit.data.raw.test_sources import FILES

RAW = str(FILES)
WEB = str(FILES / "webwalkerqa.json")
WORLD = ROOT / "examples" / "smallworld"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
        model: {{path: {WORLD}/policy}}
        data: {{folder: {tmp_path}/data}}
        rollout: {{planner: main_agent}}
        tools:
          servers:
            search_and_scrape_webpage:
              command: python
              args: [-m, megatron_matpo.mcp_tools.corpus_server,
                     --documents, {WORLD}/data/documents.jsonl]
        agents:
          main_agent: {{role: planner, tools: [browsing_agent]}}
          single_agent: {{role: planner, tools: [search_and_scrape_webpage]}}
          browsing_agent: {{role: worker, tools: [search_and_scrape_webpage]}}
        """
    )
    return str(path)


def build(folder: Path, name: str, *more: str) -> Path:
    raw = WEB if "webwalkerqa" in name else RAW
    assert main(["data", "build", name, "--raw", raw, "--out", str(folder), *more]) == 0
    return folder / name / "train-00000-of-00001.parquet"


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_config_is_built_and_found_sound(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = build(tmp_path / "a", name)
    assert build(tmp_path / "b", name).read_bytes() == first.read_bytes()
    assert build(tmp_path / "c", name, "--seed", "1").read_bytes() != first.read_bytes()
    capsys.readouterr()
    assert main(["data", "check", name, "--folder", str(tmp_path / "a")]) == 0
    output = capsys.readouterr().out
    line = next(line for line in output.splitlines() if line.startswith(f"{name} "))
    assert line.split()[1:4] == [str(3 * CONFIGS[name].repeat), "3", str(CONFIGS[name].repeat)]
    system = read_questions(name, tmp_path / "a")[0].system
    offers_worker = "## Server name: browsing_agent\n### Tool name: search_and_browse" in system
    assert offers_worker == name.startswith("matpo")
    assert ("### Tool name: google_search" in system) == name.startswith("single_agent")


def test_a_build_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path, "matpo_train_musique")
    output = capsys.readouterr().out
    assert "matpo_train_musique: 10 records read, 3 questions kept" in output
    assert "2  left out: its question holds the answer" in output
    assert "tools in the prompt: browsing_agent (search_and_browse)" in output


def test_questions_of_other_sets_and_further_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text('[{"task_id": "00000000-0000-0000-0000-000000000001"}]')
    build(tmp_path, "gaia", "--mode", "matpo", "--repeat", "2", "--ids", str(ids))
    assert len(read_questions("matpo_val_gaia_repeat_2", tmp_path)) == 2
    build(tmp_path, "matpo_train_musique", "--hops", "2")
    capsys.readouterr()
    args = ["--exclude", "matpo_train_musique", "--folder", str(tmp_path)]
    build(tmp_path, "single_agent_train_musique", *args)
    output = capsys.readouterr().out
    assert "3  left out: its question is in a set of --exclude" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gaya"], "gaya: no such data set; configs: matpo_train_musique"),
        (["gaia"], "gaia: add --mode matpo or --mode single_agent"),
        (["matpo_val_gaia_repeat_8", "--mode", "single_agent"], "matpo_val_gaia_repeat_8 is for m"),
        (["matpo_val_gaia_repeat_8", "--repeat", "2"], "has 8 of each question; say gaia --mode m"),
        (["gaia", "--mode", "matpo", "--ids", "no/ids"], "--ids no/ids: cannot be read"),
        (["matpo_train_musique", "--hops", "9"], "no question is left of 10"),
        (["matpo_train_musique", "--exclude", "none"], "none: no such file or folder"),
        (["matpo_train_musique", "--set", "a=1"], "a=1: overrides a recipe, but there is no"),
    ],
)
def test_wrong_builds_are_refused_and_write_nothing(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["data", "build", *arguments, "--raw", RAW, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_recipe_renders_the_prompts_of_a_build(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--recipe", recipe, "--set", "rollout.planner=single_agent"]
    build(tmp_path, "single_agent_val_frames_repeat_2", *args)
    system = read_questions("single_agent_val_frames_repeat_2", tmp_path)[0].system
    assert "Read a web page. Returns its text" in system
    name = "single_agent_val_frames_repeat_2"
    arguments = ["data", "build", name, "--raw", RAW, "--out", str(tmp_path / "x")]
    assert main([*arguments, "--recipe", recipe]) == 2
    assert "main_agent: delegates to browsing_agent, which does not" in capsys.readouterr().err


def test_prompts_are_rewritten_from_live_servers(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "matpo_val_frames_repeat_2"
    source = build(tmp_path / "data", name)
    before = source.read_bytes()
    target = tmp_path / "single"
    arguments = ["data", "prompts", name, str(target), "--recipe", recipe]
    capsys.readouterr()
    assert main([*arguments, "--set", "rollout.planner=single_agent"]) == 0
    output = capsys.readouterr().out
    assert "before: 6 rows: browsing_agent (search_and_browse)" in output
    assert "now:    6 rows: search_and_scrape_webpage (google_search, scrape)" in output
    assert "6 rows, 6 with another prompt" in output
    assert source.read_bytes() == before
    rows = pq.read_table(target / source.name).to_pylist()
    kwargs = rows[0]["extra_info"]["tools_kwargs"]["search_and_browse"]["create_kwargs"]
    assert kwargs["ground_truth"] == rows[0]["reward_model"]["ground_truth"]
    assert main(arguments) == 2
    assert "exists; name a new file or folder" in capsys.readouterr().err


def test_a_server_that_does_not_start_is_an_error(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "data", "matpo_train_musique")
    target = tmp_path / "new"
    arguments = ["data", "prompts", "matpo_train_musique", str(target), "--recipe", recipe]
    server = "tools.servers.search_and_scrape_webpage"
    assert main([*arguments, "--set", f"{server}.args=[-c, 'raise SystemExit(3)']"]) == 1
    assert "search_and_scrape_webpage" in capsys.readouterr().err
    assert not target.exists()


def test_a_check_counts_all_problems_and_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.parquet").write_text("no")
    good = WORLD / "data" / "matpo_eval.parquet"
    assert main(["data", "check", str(tmp_path / "x.parquet"), str(good)]) == 2
    output = capsys.readouterr().out
    assert "x.parquet: not a parquet file that can be read" in output
    assert "x.parquet: 1 problem(s), 0 rows could be read" in output
    assert "matpo_eval.parquet  64" in output  # the sound one is summarised


def test_a_recipe_checks_servers_and_lengths(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(WORLD / "data" / "matpo_eval.parquet")
    check = ["data", "check", file, "--recipe", recipe, "--max-shown", "2"]
    assert main(check) == 0
    assert "the longest user message has 14 tokens" in capsys.readouterr().out
    single = [*check, "--set", "rollout.planner=single_agent"]
    assert main(single) == 0  # rendered: the rows' prompts are not shown
    assert "64 prompt[0].content offers browsing_agent, but the" in capsys.readouterr().out
    assert main([*single, "--set", "rollout.prompts=dataset"]) == 2
    output = capsys.readouterr().out
    assert output.count("row 0: prompt[0].content: offers browsing_agent, but") == 1
    assert "... and 62 more problems" in output
    assert "      64  prompt[0].content: offers browsing_agent, but the" in output
    shown = [*check, "--set", "rollout.prompts=dataset", "--set"]
    assert main([*shown, "rollout.context_length=4117"]) == 0
    assert "the longest prompt has 19 tokens" in capsys.readouterr().out
    assert main([*shown, "rollout.context_length=4116"]) == 2  # the summary's reserve is 4096
    output = capsys.readouterr().out
    assert "prompt: expected fewer than the 19 tokens that the planner's turns may fill" in output
    assert ", got 19" in output
