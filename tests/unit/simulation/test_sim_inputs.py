"""What goes in: recordings, distributions, rates; they are read right, and errors name the fix."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_matpo.config import load_recipe
from megatron_matpo.config.gpus import GPUS
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.errors import ConfigError
from megatron_matpo.simulation.draws import ASSUMED_LENGTHS
from megatron_matpo.simulation.episodes import Agent, Turn, agents_of, all_agents
from megatron_matpo.simulation.fit import line, minimise
from megatron_matpo.simulation.lengths import AgentLengths, Drawer, Lengths, Spread
from megatron_matpo.simulation.rates import (
    SHIPPED,
    MeasuredEngine,
    Rates,
    as_yaml,
    choose_rates,
    engine_rates,
    read_section,
)
from megatron_matpo.simulation.records import read_episodes
from tests.helpers.simulated_runs import write_step

ROOT = Path(__file__).parents[3]
RECIPE = str(ROOT / "recipes" / "matpo-qwen3-14b-16n8g-h800-fp8.yaml")
WORKER = Agent(20, (Turn(21, (0.25, 0.5), (), 30), Turn(5)))
EPISODE = Agent(30, (Turn(11, (), (WORKER, WORKER), 40), Turn(3, (0.125,), (WORKER,), 7), Turn(6)))


@pytest.fixture(autouse=True)
def _in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_recording_gives_back_the_trees_that_were_recorded(tmp_path):
    write_step(tmp_path, 3, [EPISODE, WORKER], [4.5, 1.25])
    first, second = read_episodes(str(tmp_path))
    assert (first.planner, first.duration_s) == (EPISODE, 4.5)
    assert (second.planner, second.duration_s) == (WORKER, 1.25)
    file = tmp_path / "rollouts" / "step_000003.jsonl"
    assert read_episodes(str(file)) == [first, second]


def test_failed_episodes_are_left_out(tmp_path):
    write_step(tmp_path, 1, [WORKER, EPISODE], [1.0, 2.0], failure="tool_failure: gone")
    assert [item.planner for item in read_episodes(str(tmp_path))] == [WORKER]


def test_a_file_that_is_no_recording_is_named(tmp_path):
    file = tmp_path / "x.jsonl"
    for text, expected in (("nonsense\n", "expected one JSON"), ('{"a": 1}\n', "'failure'")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=expected):
            read_episodes(str(file))
    with pytest.raises(ConfigError, match="expected a run's folder with rollouts"):
        read_episodes(str(tmp_path))


def test_drawn_episodes_keep_the_recipes_limits():
    config = load_recipe(RECIPE, ["agents.browsing_agent.max_turns=4"])
    drawer = Drawer(read_section(Lengths, str(ASSUMED_LENGTHS), "--lengths"), config)
    rng = random.Random(5)
    episodes = [drawer.episode(rng) for _ in range(2000)]
    for episode in episodes:
        assert len(episode.turns) <= 20
        for agent in agents_of(episode):
            assert agent.num_tokens < 40960
            assert all(1 <= turn.num_tokens <= 16384 for turn in agent.turns)
            assert not agent.turns[-1].tools_s and not agent.turns[-1].workers
        workers = list(agents_of(episode))[1:]
        assert all(len(worker.turns) <= 4 for worker in workers)
        assert len(workers) == len(episode.turns) - 1
    assert statistics.fmean(len(e.turns) - 1 for e in episodes) == pytest.approx(2.0, rel=0.1)


def test_without_workers_the_planner_calls_tools_itself():
    config = load_recipe(RECIPE, ["rollout.planner=single_agent"])
    drawer = Drawer(read_section(Lengths, str(ASSUMED_LENGTHS), "--lengths"), config)
    episodes = [drawer.episode(random.Random(i)) for i in range(50)]
    assert len(all_agents(episodes)) == 50
    assert sum(len(turn.tools_s) for e in episodes for turn in e.turns) > 50


def test_full_contexts_end_with_a_summary_inside_the_limit():
    """Replies that fill the context at once: one turn at most, then the last one."""
    fixed = AgentLengths(Spread(100), Spread(50), Spread(20_000), 15.0)
    config = load_recipe(RECIPE, ["rollout.planner=single_agent"])
    drawer = Drawer(Lengths("", fixed, fixed, tool_s=Spread(1.0)), config)
    lengths = [drawer.episode(random.Random(i)).num_tokens for i in range(100)]
    assert max(lengths) < 40960
    assert max(lengths) > 20_000


def test_the_mean_of_a_spread_is_its_mean():
    spread = Spread(1.5, 0.8)
    rng = random.Random(0)
    draws = [spread.draw(rng) for _ in range(40_000)]
    assert statistics.fmean(draws) == pytest.approx(spread.mean, rel=0.02)
    assert statistics.median(draws) == pytest.approx(1.5, rel=0.02)


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_rates_are_read_and_say_whence(file):
    rates = read_section(Rates, str(file), "--rates")
    assert rates.source
    if rates.gpu:
        assert rates.gpu in GPUS
        text = file.read_text()
        assert "none of them measured by this project" in text
        for line_ in text.splitlines():
            assert len(line_) <= 110
    assert read_section(Rates, str(file), "x") == rates


def test_what_is_written_is_read_back(tmp_path):
    rates = Rates("me", "", "m", MeasuredEngine(0.012345, 0.5, concurrency=[1, 8]))
    file = tmp_path / "r.yaml"
    file.write_text(as_yaml(rates))
    again = read_section(Rates, str(file), "x")
    assert again.engine.step_s == pytest.approx(0.012345, rel=1e-3)
    assert again.engine.concurrency == [1, 8]
    assert again.source == "me"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"engines": {"step_s": 1}}, "engines"),
        ({"engine": {"step_s": "fast"}}, "engine.step_s=fast: expected a finite number"),
        ({"engine": {"step_s": -1.0}}, "engine.step_s=-1.0: must not be negative"),
        ({"gpu": "H800-80G", "roofline": {"hbm_frac": 60}}, "hbm_frac=60: a share, at most 1"),
        ({"gpu": "A800-80G"}, "rates of A800-80G, but cluster.gpu=H800-80G"),
        ([1, 2], "expected a mapping"),
    ],
)
def test_wrong_rates_are_refused(tmp_path, raw, expected):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError) as error:
        choose_rates(load_recipe(RECIPE, []), str(file))
    assert expected in str(error.value)
    assert str(file) in str(error.value)


def test_the_roofline_of_a_known_model():
    """Qwen3-14B on two A800: bytes and operations counted by hand."""
    config = load_recipe(RECIPE, [])
    hf = HfModelConfig.from_folder(config.model.path)
    rates = read_section(Rates, str(SHIPPED / "a800.yaml"), "x")
    num_parameters = 14_768_307_200
    engine = engine_rates(rates, config, hf, GPUS["A800-80G"], num_parameters)
    hbm = 2039e9 * 0.6 * 2
    assert engine.weights_s == pytest.approx(2 * (num_parameters - 151936 * 5120) / hbm)
    assert engine.kv_s == pytest.approx(2 * 40 * 8 * 128 * 2 / hbm)
    per_layer = 2 * 5120 * (5120 + 2 * 1024) + 2 * 5120 * 5120 + 6 * 5120 * 17408
    flops = 312e12 * 0.55 * 2
    assert engine.prefill_token_s == pytest.approx(40 * per_layer / flops)
    assert engine.compute_s == pytest.approx((40 * per_layer + 2 * 5120 * 151936) / flops)
    assert engine.overhead_s == pytest.approx(0.004 + 2 * 40 * 15e-6)


def test_a_table_of_throughputs_becomes_steps():
    config = load_recipe(RECIPE, [])
    hf = HfModelConfig.from_folder(config.model.path)
    measured = MeasuredEngine(concurrency=[64, 1], tokens_per_s=[800.0, 70.0], tensor=2)
    engine = engine_rates(Rates(engine=measured), config, hf, None, 1)
    assert engine.step_s(64, 0) == pytest.approx(0.08)
    assert engine.step_s(1, 0) == pytest.approx(1 / 70)
    wrongs = (
        MeasuredEngine(concurrency=[1], tokens_per_s=[1.0, 2.0], tensor=2),
        MeasuredEngine(),
        replace(measured, tensor=1),
    )
    for wrong in wrongs:
        with pytest.raises(ConfigError, match="rates: "):
            engine_rates(Rates(engine=wrong), config, hf, None, 1)


def test_the_simplex_finds_a_minimum_and_the_line_its_points():
    best = minimise(lambda p: (p[0] - 3) ** 2 + 10 * (p[1] - 0.5) ** 2, (1.0, 1.0), 300)
    assert best == pytest.approx([3.0, 0.5], rel=1e-3)
    assert line([1, 2, 3], [5, 7, 9]) == pytest.approx((3, 2))
    assert line([1, 2, 3], [1, 4, 7]) == pytest.approx((0, 30 / 14)), "never below 0"
    assert line([1, 2, 3], [3, 2, 1]) == pytest.approx((2, 0))
