"""Placements and phases against closed forms; calibration against a machine that is known."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megatron_matpo.config import load_recipe
from megatron_matpo.config.flops import Shape, training_flops
from megatron_matpo.config.gpus import GPUS
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.errors import ConfigError
from megatron_matpo.planning.shape import job_of
from megatron_matpo.simulation.calibrate import calibrate
from megatron_matpo.simulation.command import Request, simulate
from megatron_matpo.simulation.engine import EngineRates
from megatron_matpo.simulation.episodes import Agent, Turn
from megatron_matpo.simulation.placements import Setup, asynchronous, colocated, disaggregated
from megatron_matpo.simulation.rates import MoveRates, TrainRates
from megatron_matpo.simulation.rollout import Fleet
from megatron_matpo.simulation.training import Trainer
from tests.helpers.simulated_runs import QUICKSTART, ROOT, write_run

QWEN = str(ROOT / "recipes" / "matpo-qwen3-14b-16n8g-a800.yaml")
LENGTH = 1000


@pytest.fixture(autouse=True)
def _in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def trainer_of(*overrides: str, train: TrainRates, move: MoveRates | None = None) -> Trainer:
    config = load_recipe(QWEN, ["cluster.gpu=A800-80G", "checkpoint.every=0", *overrides])
    hf = HfModelConfig.from_folder(config.model.path)
    return Trainer(config, job_of(config, hf), GPUS["A800-80G"], train, move or MoveRates())


def setup_of(rollout_s: float, train_s: float, push_s: float = 0.0) -> Setup:
    """A rollout of one generation, and a training step of a known length."""
    train = TrainRates(mfu=1.0, update_s=train_s)
    trainer = trainer_of(train=replace(train, tflops_per_device=1e9), move=MoveRates(push_s=push_s))
    rates = EngineRates(overhead_s=rollout_s / 100)
    return Setup(Fleet(2, rates, 64, 10**6), trainer, 4, 64, 128)


def draw(step: int) -> tuple[list[Agent], tuple[float, ...]]:
    return [Agent(10, (Turn(101),))] * 4, ()


def test_in_turns_everything_adds_up():
    outcome = disaggregated(setup_of(10.0, 3.0, 1.0), draw, 2)
    assert outcome.rollout_s == pytest.approx(10.0)
    assert outcome.step_s == pytest.approx(14.0, rel=1e-6)
    assert outcome.engines_busy == pytest.approx(10 / 14, rel=1e-6)
    assert outcome.trainer_busy == pytest.approx(3 / 14, rel=1e-6)
    assert outcome.tokens_per_s == pytest.approx(404 / 14, rel=1e-6)
    assert outcome.tokens_per_s_device == pytest.approx(404 / 14 / 128, rel=1e-6)


@pytest.mark.parametrize(("rollout_s", "train_s"), [(10.0, 3.0), (3.0, 10.0), (5.0, 5.0)])
@pytest.mark.parametrize("staleness", [1, 2])
def test_asynchronous_is_as_slow_as_the_slower_side(rollout_s, train_s, staleness):
    """Between the slower side alone and both in turns.

    A decode step costs the same for any number of sequences here, so overlapping rollouts do not
    slow one another: 1 + staleness steps take the longer of their trainings and R + T.
    """
    setup = setup_of(rollout_s, train_s)
    outcome = asynchronous(setup, draw, 4, staleness)
    expected = max(train_s, (rollout_s + train_s) / (1 + staleness))
    assert outcome.step_s == pytest.approx(expected, rel=1e-6)
    assert outcome.trainer_busy == pytest.approx(train_s / expected, rel=1e-6)
    assert outcome.rollout_s == pytest.approx(expected - train_s, abs=1e-6)


def test_engines_that_are_full_gain_nothing_from_more_staleness():
    """One sequence at a time: the engine's work is the bound, R per step."""
    setup = setup_of(10.0, 3.0)
    narrow = replace(setup, fleet=replace(setup.fleet, num_engines=1, max_running=4))
    for staleness in (1, 2):
        outcome = asynchronous(narrow, draw, 4, staleness)
        assert outcome.step_s == pytest.approx(10.0, rel=1e-3)
        assert outcome.engines_busy == pytest.approx(1.0, rel=1e-3)


def test_a_push_stops_asynchronous_engines():
    outcome = asynchronous(setup_of(2.0, 10.0, 1.5), draw, 3, 1)
    assert outcome.step_s == pytest.approx(11.5, rel=1e-6)


def test_colocated_pays_for_handing_over():
    base = setup_of(10.0, 3.0)
    move = MoveRates(host_gb_s=20, switch_s=2.0)
    trainer = replace(base.trainer, move=move)
    setup = replace(base, trainer=trainer, engine_weight_bytes=10 * 10**9)
    outcome = colocated(setup, draw, 1)
    assert outcome.switch_s > 2 * 2.0 + 10 / 20
    assert outcome.step_s == pytest.approx(13.0 + outcome.switch_s, rel=1e-6)


def test_training_time_is_operations_over_what_the_ranks_make():
    trainer = trainer_of("train.recompute=none", train=TrainRates(mfu=0.5))
    episodes = [Agent(LENGTH - 100, (Turn(100),))] * 640
    shape = Shape.of(trainer.job.hf)
    flops = training_flops(shape, [LENGTH] * 640, 64_000)
    expected = flops / 64 / (0.5 * 312e12)
    assert trainer.phases(episodes).train_s == pytest.approx(expected)
    full = replace(trainer, job=replace(trainer.job, layout=replace(
        trainer.job.layout, recompute="full")))  # fmt: skip
    assert full.phases(episodes).train_s == pytest.approx(expected * 4 / 3)


def test_no_replica_has_less_than_the_longest_trajectory():
    trainer = trainer_of("train.recompute=none", train=TrainRates(mfu=0.5))
    longest = Agent(39_000, (Turn(1),))
    alone = trainer.phases([longest]).train_s
    flops = training_flops(Shape.of(trainer.job.hf), [39_001], 0)
    assert alone == pytest.approx(flops / 8 / (0.5 * 312e12), rel=1e-3)


def test_a_pipeline_waits_for_its_bubble():
    rates = TrainRates(mfu=0.5)
    episodes = [Agent(40_000, (Turn(900),))] * 32
    flat = trainer_of("parallel.tensor=8", "parallel.context=1", train=rates)
    deep = trainer_of("parallel.tensor=2", "parallel.context=1", "parallel.pipeline=4", train=rates)
    micro_batches = 32 / 8
    ratio = deep.phases(episodes).train_s / flat.phases(episodes).train_s
    assert ratio == pytest.approx((micro_batches + 3) / micro_batches)


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        ((), 0),
        (("algo.updates_per_step=4",), 1),
        (("algo.updates_per_step=4", "algo.kl_coef=0.1"), 2),
        (("algo.updates_per_step=4", "algo.old_logprobs=engine"), 0),
        (("algo.kl_coef=0.1",), 1),
    ],
)
def test_scoring_passes_are_those_of_the_learner(overrides, passes):
    trainer = trainer_of("train.recompute=none", *overrides, train=TrainRates(mfu=0.5))
    phases = trainer.phases([Agent(900, (Turn(100),))] * 640)
    assert phases.score_s == pytest.approx(passes * phases.train_s / 3)


def test_the_originals_number_of_updates_grows_with_the_workers():
    """As `data/schedule.py: split_by_trajectories`: an update is a share of the planners' rows."""
    ours = trainer_of("algo.updates_per_step=4", train=TrainRates(mfu=0.5))
    theirs = trainer_of("algo.updates_per_step=4", "compat=reference", train=TrainRates(mfu=0.5))
    assert ours.num_updates(64, 64 * 3) == 4
    assert theirs.num_updates(64, 64 * 3) == 12
    assert theirs.num_updates(64, 64 * 3 + 1) == 13
    assert ours.num_updates(2, 6) == 2, "no update without an episode"


def test_bytes_over_bandwidth():
    move = MoveRates(push_gb_s=10, push_s=1.0, write_gb_s=5, host_gb_s=20)
    trainer = trainer_of(
        "checkpoint.every=10", "checkpoint.asynchronous=false",
        train=TrainRates(mfu=0.5), move=move,
    )  # fmt: skip
    phases = trainer.phases([Agent(900, (Turn(100),))])
    assert phases.sync_s == pytest.approx(1.0 + 14.768e9 * 2 / 10e9, rel=1e-3)
    assert phases.checkpoint_s == pytest.approx(14.768e9 * 14 / 5e9 / 10, rel=1e-3)
    hidden = replace(trainer, config=load_recipe(QWEN, ["checkpoint.every=10"]))
    copied = 14.768e9 * 14 / (64 * 20e9) / 10
    assert hidden.phases([Agent(900, (Turn(100),))]).checkpoint_s == pytest.approx(copied, rel=1e-3)


def test_adapters_need_no_gradients_of_the_weights():
    episodes = [Agent(900, (Turn(100),))] * 640
    rates = TrainRates(mfu=0.5, network_gb_s=25)
    whole = trainer_of("train.recompute=none", train=TrainRates(mfu=0.5)).phases(episodes)
    lora = trainer_of("train.recompute=none", "lora.rank=8", train=rates).phases(episodes)
    assert lora.train_s == pytest.approx(whole.train_s * 2 / 3)


def test_rates_without_a_trainer_are_refused():
    with pytest.raises(ConfigError, match=r"train\.mfu"):
        trainer_of(train=TrainRates()).phases([Agent(10, (Turn(5),))])


MACHINE = EngineRates(
    overhead_s=0.006, per_sequence_s=3e-4, prefill_base_s=0.004, prefill_token_s=2e-5,
    request_s=0.003,
)  # fmt: skip


def random_episodes(count: int, seed: int) -> list[Agent]:
    rng = random.Random(seed)

    def agent(num_turns: int, workers: bool) -> Agent:
        turns = tuple(
            Turn(
                rng.randint(3, 12),
                () if workers else (rng.uniform(0.001, 0.04),),
                (agent(rng.randint(0, 3), False),) if workers else (),
                rng.randint(5, 40),
            )
            for _ in range(num_turns)
        )
        return Agent(rng.randint(15, 30), (*turns, Turn(rng.randint(2, 6))))

    return [agent(rng.randint(0, 3), True) for _ in range(count)]


def test_runs_that_say_nothing_are_refused(tmp_path):
    rates = {"update_s": 0.1, "tflops": 0.02}
    steps = [random_episodes(4, step) for step in range(2)]
    write_run(tmp_path / "one", steps, MACHINE, **rates)
    write_run(tmp_path / "two", steps, MACHINE, **rates, overrides=["rollout.tensor=2"])
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"no usable recording of steps 5-9 in it; it has .* 1-2"):
        calibrate([one], (5, 9))
    with pytest.raises(
        ConfigError, match=r"differ in model\.path, cluster\.gpu or rollout\.tensor"
    ):
        calibrate([one, two])
    with pytest.raises(ConfigError, match=r"--from-run: rates of a CPU, but cluster\.gpu="):
        simulate(Request(QWEN, [], from_run=(one,)))
    for file in (tmp_path / "one" / "rollouts").iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match="no step has a recording"):
        calibrate([one])


def test_a_known_machine_is_found_again_and_predicted_elsewhere(tmp_path):
    """Rates from steps of 6 and 32 episodes predict one of 16, drawn anew, on the same machine."""
    sizes = {"small": (6, "2x3"), "large": (32, "8x4"), "middle": (16, "4x4")}
    for seed, (name, (count, shape)) in enumerate(sizes.items()):
        prompts, samples = shape.split("x")
        write_run(
            tmp_path / name,
            [random_episodes(count, 100 * seed + step) for step in range(3)],
            MACHINE,
            update_s=0.1,
            tflops=0.02,
            overrides=[f"data.prompts_per_step={prompts}", f"data.samples_per_prompt={samples}"],
        )
    runs = (str(tmp_path / "small"), str(tmp_path / "large"))
    fit = calibrate(runs)
    assert fit.mean_error < 0.05
    assert fit.rates.train.update_s == pytest.approx(0.1, rel=1e-3)
    assert fit.rates.train.tflops_per_device == pytest.approx(0.02, rel=1e-3)
    assert fit.rates.train.step_s == pytest.approx(0.03, rel=1e-3)
    overrides = ["data.prompts_per_step=4", "data.samples_per_prompt=4"]
    middle = (str(tmp_path / "middle"),)
    predicted = simulate(Request(QUICKSTART, overrides, from_run=runs, num_steps=6)).outcomes[0]
    own = simulate(Request(QUICKSTART, overrides, from_run=middle, num_steps=6)).outcomes[0]
    assert predicted.rollout_s == pytest.approx(own.rollout_s, rel=0.15)
    assert predicted.train_s == pytest.approx(own.train_s, rel=0.15)
