"""Where the episodes of a simulated step come from: recordings, or distributions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_matpo.config import Config
from megatron_matpo.config.reward import JUDGE
from megatron_matpo.simulation.calibrate import Calibration
from megatron_matpo.simulation.episodes import Agent
from megatron_matpo.simulation.lengths import Drawer, Lengths, Spread
from megatron_matpo.simulation.placements import Draw
from megatron_matpo.simulation.rates import read_section
from megatron_matpo.simulation.records import RecordedEpisode, read_episodes

ASSUMED_LENGTHS = Path(__file__).parent / "lengths" / "matpo.yaml"


def choose_draws(lengths: str, config: Config, fit: Calibration | None) -> tuple[Draw, str]:
    """How a step's episodes are drawn, and how to say where they come from.

    Args:
        lengths: `--lengths`; empty takes the recordings of the runs that rates were fitted to, or
            the assumed distributions.
        config: gives seed, number of episodes, and limits of drawn ones.
        fit: of `--from-run`.

    Raises:
        ConfigError: the file is not what it should be.
    """
    if lengths.endswith((".yaml", ".yml")) or not (lengths or fit):
        path = lengths or str(ASSUMED_LENGTHS)
        known = read_section(Lengths, path, "--lengths")
        source = f"{path}: {known.source}" if lengths else known.source
        return _drawing(Drawer(known, config).episode, config, known.judge_s), source
    recorded: Sequence[RecordedEpisode] = (
        read_episodes(lengths) if lengths else fit.episodes if fit else ()
    )
    planners = [episode.planner for episode in recorded]
    judge_s = Spread(fit.judge_s if fit else 0.0)
    source = f"{len(planners)} recorded episodes, drawn with replacement"
    return _drawing(lambda rng: rng.choice(planners), config, judge_s), source


def _drawing(episode: Callable[[random.Random], Agent], config: Config, judge_s: Spread) -> Draw:
    """A step's episodes are a function of the seed and its number."""
    count = config.data.prompts_per_step * config.data.samples_per_prompt

    def draw(step: int) -> tuple[Sequence[Agent], Sequence[float]]:
        rng = random.Random(f"{config.run.seed}/{step}")
        episodes = [episode(rng) for _ in range(count)]
        has_judge = config.reward.grader == JUDGE
        return episodes, [judge_s.draw(rng) for _ in episodes] if has_judge else ()

    return draw
