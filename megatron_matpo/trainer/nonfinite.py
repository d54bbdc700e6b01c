"""What a run does about an update that is not finite: `train.on_non_finite`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from megatron_matpo.config.train import TrainConfig
from megatron_matpo.errors import NonFiniteError
from megatron_matpo.megatron.actor import UpdateResult
from megatron_matpo.megatron.nonfinite import UpdateRefused, write_dump
from megatron_matpo.megatron.parallel import ParallelState
from megatron_matpo.obs.spans import span

_log = logging.getLogger(__name__)

FOLDER = "nonfinite"
"""Of the run; holds step_N/update_K."""


class NonFinitePolicy:
    """Stops or skips, and writes the batch in both cases. Every rank decides the same.

    The number of updates skipped in a row is not part of checkpoints: a resumed run counts anew.
    """

    def __init__(self, train: TrainConfig, run_dir: Path, state: ParallelState) -> None:
        """Keep the parts."""
        self._train, self._run_dir, self._state = train, run_dir, state
        self._in_row = 0

    def attempt(
        self, update: Callable[[], UpdateResult], *, step: int, index: int
    ) -> UpdateResult | None:
        """The result of `update`, the step's `index`-th; None if it was skipped. All ranks call.

        Raises:
            NonFiniteError: the update is not finite, and the setting says to stop, or too many
                before it were skipped.
        """
        try:
            with span("update", index=index):
                result = update()
        except UpdateRefused as refused:
            self._refuse(refused, step, index)
            return None
        self._in_row = 0
        return result

    def _refuse(self, refused: UpdateRefused, step: int, index: int) -> None:
        folder = self._run_dir / FOLDER / f"step_{step:06d}" / f"update_{index}"
        written = write_dump(folder, refused, {"step": step, "update": index}, self._state)
        where = f"; its batch is in {folder}" if written else ""
        text = f"step {step}, update {index}: {refused}{where}"
        if self._train.on_non_finite == "stop":
            raise NonFiniteError(f"{text}; train.on_non_finite=skip goes on without it")
        self._in_row += 1
        if self._in_row > self._train.max_skipped_updates:
            raise NonFiniteError(
                f"{text}; train.max_skipped_updates={self._train.max_skipped_updates} updates "
                "before it were skipped in a row"
            )
        if self._state.is_logging_rank:
            _log.warning("skipped: %s", text)
