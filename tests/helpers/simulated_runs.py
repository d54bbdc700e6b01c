"""Folders that look like those of runs, made by the simulator itself with rates that a test knows.

Recordings are written by the recorder (`obs/recorder.py`), so the reader is held to the writer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_matpo.config import dump_config, load_recipe
from megatron_matpo.config.flops import Shape, training_flops
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.obs.recorder import write_rollouts_jsonl
from megatron_matpo.simulation.calibrate import fleet_of
from megatron_matpo.simulation.engine import EngineRates
from megatron_matpo.simulation.episodes import Agent, all_agents
from megatron_matpo.simulation.rollout import run_step
from megatron_matpo.types import (
    CallRecord,
    Episode,
    Group,
    Reward,
    Role,
    RolloutBatch,
    Status,
    Trajectory,
    Turn,
    TurnKind,
    VersionSpan,
)

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")


def _model_turn(num_tokens: int) -> Turn:
    spans = (VersionSpan(0, num_tokens),)
    return Turn(TurnKind.MODEL, [1] * num_tokens, "x", [0.0] * num_tokens, spans)


def _trajectories(agent: Agent, episode_id: str) -> list[Trajectory]:
    """The agent's own trajectory, then its workers'."""
    workers: list[Trajectory] = []

    def one(item: Agent, name: str, parent: str) -> Trajectory:
        turns = [Turn(TurnKind.PROMPT, [1] * item.prompt_tokens, "x")]
        calls: list[CallRecord] = []
        for number, turn in enumerate(item.turns, start=1):
            turns.append(_model_turn(turn.num_tokens))
            here = len(turns) - 1
            calls += [
                CallRecord(here, "web", "search", "ok", "", seconds) for seconds in turn.tools_s
            ]
            for worker in turn.workers:
                worker_id = f"{episode_id}.w{len(workers)}"
                workers.append(one(worker, worker_id, name))
                calls.append(CallRecord(here, "browser", "ask", "ok", worker_id, 1.0))
            if number < len(item.turns):
                turns.append(Turn(TurnKind.ENVIRONMENT, [1] * turn.reply_tokens, "x"))
        role = Role.WORKER if parent else Role.PLANNER
        return Trajectory(
            name, role, "a", parent, 0, tuple(turns), Status.ANSWERED, 1.0, tuple(calls)
        )

    return [one(agent, f"{episode_id}.p", ""), *workers]


def write_step(
    folder: Path,
    step: int,
    episodes: Sequence[Agent],
    durations: Sequence[float],
    failure: str = "",
) -> None:
    """`rollouts/step_N.jsonl`; with `failure` the last episode has failed."""
    rows: list[Episode] = []
    for index, agent in enumerate(episodes):
        planner, *workers = _trajectories(agent, f"e{index}")
        is_failed = bool(failure) and index == len(episodes) - 1
        rows.append(
            Episode(
                id=f"e{index}",
                uid="g",
                sample_index=index,
                planner=planner,
                workers=tuple(workers),
                reward=None if is_failed else Reward(1.0, 1.0, 1.0),
                failure=failure if is_failed else "",
                duration_s=durations[index],
            )
        )
    group = Group("g", "test", "?", "!", 0, tuple(rows))
    path = folder / "rollouts" / f"step_{step:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rollouts_jsonl(path, RolloutBatch(step, step - 1, (group,)), {})


def write_run(
    folder: Path,
    steps: Sequence[Sequence[Agent]],
    rates: EngineRates,
    *,
    update_s: float,
    tflops: float,
    overrides: Sequence[str] = (),
) -> None:
    """A run of the quickstart's recipe on a machine with these rates."""
    config = load_recipe(QUICKSTART, list(overrides))
    shape = Shape.of(HfModelConfig.from_folder(config.model.path))
    lines: list[str] = []
    for number, episodes in enumerate(steps, start=1):
        fleet = fleet_of(config, rates, config.rollout.max_total_tokens)
        record = run_step(fleet, episodes).steps[1]
        durations = [record.durations[index] for index in range(len(episodes))]
        write_step(folder, number, episodes, durations)
        agents = all_agents(episodes)
        lengths = [agent.num_tokens for agent in agents]
        trained = sum(agent.num_sampled for agent in agents)
        flops = training_flops(shape, lengths, trained) / config.parallel.world_size
        train_s = update_s + flops / (tflops * 1e12)
        parts = {"collect": record.done, "score": 0.001, "train": train_s, "sync": 0.02}
        metrics = {f"time/{name}_s": value for name, value in parts.items()}
        metrics |= {"time/step_s": sum(parts.values()) + 0.03}
        lines.append(json.dumps({"step": number, **metrics}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text(dump_config(config))
