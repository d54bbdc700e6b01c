"""A step's batch and metrics out of groups that outlive steps."""

from __future__ import annotations

from megatron_matpo.config.root import Config
from megatron_matpo.rewards.scorer import Scorer
from megatron_matpo.rollout.metrics import MeteredToolBox, discard_metrics, rollout_metrics
from megatron_matpo.rollout.open_groups import OpenGroups
from megatron_matpo.rollout.step_trace import StepTrace
from megatron_matpo.types import PolicyVersion, RolloutBatch


class LastingRollout:
    """Tools and grader of all steps, counted from hand-over to hand-over."""

    def __init__(
        self,
        config: Config,
        groups: OpenGroups,
        tools: MeteredToolBox,
        scorer: Scorer,
        trace: StepTrace,
    ) -> None:
        """`tools`, `scorer` and `trace` are those that `groups` use."""
        self._config = config
        self.groups = groups
        self._tools, self._scorer, self._trace = tools, scorer, trace
        self._last: RolloutBatch | None = None

    async def collect(self, step: int, version: PolicyVersion, position: int) -> RolloutBatch:
        """As `OpenGroups.collect`, as a batch; asked again, it is the same one."""
        if self._last is not None and self._last.step == step:
            return self._last
        self._trace.open(step)
        taken = await self.groups.collect(step, version, position)
        self._trace.open(step + 1)
        metrics = rollout_metrics(taken.groups, taken.seconds)
        metrics |= self._tools.metrics() | self._scorer.metrics() | taken.metrics
        if self._config.rollout.dynamic_sampling:
            metrics |= discard_metrics(taken.discarded)
        self._tools.restart()
        self._scorer.restart()
        batch = RolloutBatch(step, version, tuple(taken.groups), metrics, taken.next_position)
        self._last = batch
        return batch

    async def close(self) -> None:
        """End the episodes, and then the trace."""
        await self.groups.close()
        self._trace.close()
