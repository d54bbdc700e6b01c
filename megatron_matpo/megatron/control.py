"""All trainer ranks over gloo, for small objects on the host, with a deadline of its own.

Apart from the default group: on GPUs that one is NCCL's, where a small object would wait for the
stream's kernels, and its deadline is the training step's.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_matpo.errors import CheckpointError, DeadlineError

_TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)
# Ranks come to a meeting at different times, after waits of their own up to the same deadline.
SLACK_S = 30.0


class ControlGroup:
    """Meetings of all trainer ranks. Every method is collective."""

    def __init__(self, timeout_s: float, setting: str) -> None:
        """Form the group.

        Args:
            timeout_s: deadline of every meeting.
            setting: dotted path of the deadline, for errors.
        """
        self.timeout_s, self.setting = timeout_s, setting
        limit = datetime.timedelta(seconds=timeout_s + SLACK_S)
        group = dist.new_group(backend="gloo", timeout=limit)
        assert isinstance(group, dist.ProcessGroup), "every rank is a member"
        self._group = group
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def share(self, value: Any) -> list[Any]:
        """Every rank's `value`, in order, on every rank.

        Raises:
            DeadlineError: a rank did not come in time.
        """
        values: list[Any] = [None] * self.world_size
        self._meet(lambda: dist.all_gather_object(values, value, group=self._group))
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in order, on rank 0; elsewhere nothing.

        Raises:
            DeadlineError: a rank did not come in time.
        """
        values: list[Any] = [None] * self.world_size if self.rank == 0 else []
        self._meet(lambda: dist.gather_object(value, values or None, dst=0, group=self._group))
        return values

    def on_first(self, action: Callable[[], Any], what: str) -> Any:
        """Run `action` on rank 0; its result on every rank.

        Raises:
            CheckpointError: on every rank, `WHAT: ...`, if `action` raised an error of the disk or
                of a file's content.
            DeadlineError: it took too long.
        """
        outcome: list[Any] = [None, ""]
        if self.rank == 0:
            try:
                outcome[0] = action()
            except (OSError, ValueError, CheckpointError) as error:
                outcome[1] = f"{what}: {error}"
        self._meet(lambda: dist.broadcast_object_list(outcome, src=0, group=self._group))
        if outcome[1]:
            raise CheckpointError(outcome[1])
        return outcome[0]

    def expired(self, what: str) -> DeadlineError:
        """The error of a wait that took too long."""
        return DeadlineError(f"{what} within {self.setting}={self.timeout_s:g}")

    def _meet(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            if _TIMED_OUT.search(str(error)):
                raise self.expired("the trainer ranks did not meet") from error
            raise
