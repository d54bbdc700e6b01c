"""Which episodes a step or an evaluation runs: pure functions of questions and settings."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_matpo.config.evaluation import TRAIN_SPLIT, EvalConfig
from megatron_matpo.config.root import Config
from megatron_matpo.data.dataset import Question, prompts_from
from megatron_matpo.errors import ConfigError
from megatron_matpo.rollout.scheduler import GroupJob
from megatron_matpo.types import RowAsk


def train_jobs(
    config: Config,
    questions: Sequence[Question],
    step: int,
    place: int,
    position: int,
    count: int,
) -> list[GroupJob]:
    """The `count` questions that follow the first `position` ones of the run, in their order.

    Args:
        config: a validated configuration; says how many episodes a question gets.
        questions: rows of the training set.
        step: training step; part of the ids.
        place: groups that began in this step before; part of the ids.
        position: questions that the run asked before.
        count: how many are asked now.

    Raises:
        ConfigError: there are no rows.
    """
    if not questions:
        raise ConfigError(f"data.{TRAIN_SPLIT}: there are no rows to collect")
    rows = prompts_from(len(questions), count, config.run.seed, position)
    # The place is part of the uid: where two epochs meet, a step can hold a row twice.
    return [
        GroupJob(
            f"{TRAIN_SPLIT}-{step}-{number}", row, questions[row], config.data.samples_per_prompt
        )
        for number, row in enumerate(rows, place)
    ]


def eval_jobs(
    config: Config,
    questions: Sequence[Question],
    step: int,
    split: str,
    asks: Sequence[RowAsk] | None = None,
) -> list[GroupJob]:
    """The groups of one request of an evaluation, in their order.

    Args:
        config: a validated configuration.
        questions: rows of the set.
        step: training step; only part of the ids.
        split: name of the set.
        asks: these rows; None: the set's first `eval.max_rows` rows and `eval.samples_per_row`
            episodes of each.

    Raises:
        ConfigError: there are no rows, or a row that is asked does not exist.
    """
    if not questions:
        raise ConfigError(f"{split}: there are no rows to collect")
    if asks is None:
        asks = wanted_rows(config.eval, len(questions))
    if wrong := [ask.row for ask in asks if not 0 <= ask.row < len(questions)]:
        raise ConfigError(f"{split}: has {len(questions)} rows, so there is no row {wrong[0]}")
    return [
        GroupJob(f"{split}-{step}-{position}", ask.row, questions[ask.row], ask.num_samples)
        for position, ask in enumerate(asks)
    ]


def wanted_rows(config: EvalConfig, num_rows: int) -> list[RowAsk]:
    """What a whole evaluation of a set of `num_rows` rows asks."""
    count = min(config.max_rows or num_rows, num_rows)
    return [RowAsk(row, config.samples_per_row) for row in range(count)]
