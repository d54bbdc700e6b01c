"""A step's batch and metrics out of groups that outlive steps."""

from __future__ import annotations

import asyncio
from typing import Protocol

from megatron_matpo.agents.sampling import Sampler
from megatron_matpo.config.root import Config
from megatron_matpo.rewards.scorer import Scorer
from megatron_matpo.rollout.metrics import MeteredToolBox, discard_metrics, rollout_metrics
from megatron_matpo.rollout.open_groups import OpenGroups
from megatron_matpo.rollout.step_trace import StepTrace
from megatron_matpo.types import PolicyVersion, RolloutBatch


class MovingPolicy(Protocol):
    """Engines whose weights change while they sample (`routing.Router`)."""

    def expect(self, version: PolicyVersion) -> None:
        """From now on an engine may serve up to `version`."""
        ...

    def follower(self) -> Sampler:
        """The policy as it is when it samples, for one episode."""
        ...


class LastingRollout:
    """Tools and grader of all steps, counted from hand-over to hand-over."""

    def __init__(
        self,
        config: Config,
        groups: OpenGroups,
        tools: MeteredToolBox,
        scorer: Scorer,
        trace: StepTrace,
        policy: MovingPolicy | None,
    ) -> None:
        """`tools`, `scorer`, `trace` and `policy` are those that `groups` use."""
        self._config, self._policy = config, policy
        self.groups = groups
        self._tools, self._scorer, self._trace = tools, scorer, trace
        self._last: RolloutBatch | None = None
        self._one_at_a_time = asyncio.Lock()

    async def collect(self, step: int, version: PolicyVersion, position: int) -> RolloutBatch:
        """As `OpenGroups.collect`, as a batch; asked again, also meanwhile, it is the same one."""
        async with self._one_at_a_time:
            if self._last is None or self._last.step != step:
                self._last = await self._collect(step, version, position)
            return self._last

    async def _collect(self, step: int, version: PolicyVersion, position: int) -> RolloutBatch:
        if self._policy is not None:
            # The trainer pushes the next version before it asks again, in the middle of turns.
            self._policy.expect(version + 1)
        self._trace.open(step)
        taken = await self.groups.collect(step, version, position)
        if step < self._config.run.steps:
            self._trace.open(step + 1)
        else:
            self._trace.close()
        metrics = rollout_metrics(taken.groups, taken.seconds)
        metrics |= self._tools.metrics() | self._scorer.metrics() | taken.metrics
        if self._config.rollout.dynamic_sampling:
            metrics |= discard_metrics(taken.discarded)
        self._tools.restart()
        self._scorer.restart()
        return RolloutBatch(step, version, tuple(taken.groups), metrics, taken.next_position)

    async def close(self) -> None:
        """End the episodes, and then the trace."""
        await self.groups.close()
        self._trace.close()
