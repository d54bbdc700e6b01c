"""Groups that outlive the step in which they began: asynchronous rollout, and over-sampling.

    admit    a step that trains from version v fills up to (max_staleness + 1) x prompts_per_step
             groups that are begun and not handed over, plus `rollout.over_sample`
    sample   episodes go on while the trainer trains and while weights are pushed
    take     the first `prompts_per_step` groups that are complete, in the order of their ends;
             inside the batch they stand in the order in which they began
    leave    a group with a trained token older than `max_staleness` is asked anew, or dropped

Invariants:

* every question of the data's order is begun once, and handed over once unless it is dropped
  (counted); no episode is handed over twice;
* no trained token is older than `rollout.max_staleness` versions;
* with a bound of 0 and no over-sampling a step is the synchronous one;
* with a bound of 0 nothing samples between two steps.

Source: AReaL, arXiv:2505.24298, section 5.1 (admission by staleness) and 5.2 (what the importance
weights correct). Differs: the bound holds for every token, by its own version, not only for
admission; and what could not be taken in a later step is waited for by default
(`rollout.on_stale`), because leaving out whatever takes long would train on short episodes alone.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from megatron_matpo.agents.driver import EpisodeTree
from megatron_matpo.agents.sampling import Sampler
from megatron_matpo.config.root import Config
from megatron_matpo.data.dataset import Question
from megatron_matpo.errors import DataError
from megatron_matpo.obs.spans import Sink, recording
from megatron_matpo.rewards.scorer import Scorer
from megatron_matpo.rollout.failures import FailureBound
from megatron_matpo.rollout.jobs import train_jobs
from megatron_matpo.rollout.open_group import OpenGroup, Taken, since
from megatron_matpo.rollout.scheduler import GroupJob, Scheduler
from megatron_matpo.rollout.staleness import staleness_metrics
from megatron_matpo.types import Episode, Group, PolicyVersion, RolloutBatch

Play = Callable[[Sampler, str, Question], Awaitable[EpisodeTree]]
"""(policy, episode id, question) -> what the episode left behind."""


@dataclass(slots=True)
class _Counts:
    """Of one step."""

    dropped: int = 0
    refreshed: int = 0
    ended: int = 0
    discarded: list[Group] = field(default_factory=list[Group])


class OpenGroups:
    """The groups of a run that are begun and not handed over. Lives in one event loop."""

    def __init__(
        self,
        config: Config,
        rows: Sequence[Question],
        play: Play,
        policy: Callable[[PolicyVersion], Sampler],
        scorer: Scorer,
        sink: Sink | None = None,
    ) -> None:
        """Begin nothing yet.

        Args:
            config: a validated configuration.
            rows: of the training set.
            play: runs an episode.
            policy: makes the sampler of one episode that begins in a step of this version; with a
                bound of 1 or more it has to go on under later versions.
            scorer: of all episodes.
            sink: where their spans go, if steps are traced.
        """
        self._config, self._rows = config, rows
        self._play, self._policy, self._sink = play, policy, sink
        # Failures count per step, where groups are handed over.
        limits = replace(config.rollout, max_failed_frac=1.0)
        self._scheduler = Scheduler(scorer, limits)
        prompts = config.data.prompts_per_step
        extra = math.ceil(config.rollout.over_sample * prompts)
        self._most_open = (config.rollout.max_staleness + 1) * prompts + extra
        self._open: dict[int, OpenGroup] = {}
        self._first: deque[tuple[GroupJob, dict[int, Episode]]] = deque()
        """Begun before further questions: what was refreshed, ended or in a checkpoint."""
        self._reserved: frozenset[str] = frozenset()
        self._news: list[OpenGroup] = []
        """Complete, and not looked at yet."""
        self._changed = asyncio.Event()
        self._cancelled: set[asyncio.Task[Group]] = set()
        self._step = self._place = self._serial = self._num_completed = 0
        self._version: PolicyVersion = 0
        self._position: int | None = None
        self._counts = _Counts()
        self._handed: Taken | None = None
        self._since_s = 0.0

    async def collect(self, step: int, version: PolicyVersion, position: int) -> Taken:
        """The groups of `step`, which trains from `version`.

        Who goes away while this waits loses nothing: the groups stay open. Who asks for the same
        step again gets the same groups.

        Args:
            step: training step, one more than the last one.
            version: policy version that the step trains from, which the engines serve by now.
            position: questions begun before; only the first call's counts, without `restore`.

        Raises:
            RolloutError: too many of the step's episodes failed outside the model, or the judge
                refuses every request.
        """
        if self._handed is not None and self._handed.step == step:
            return self._handed
        self._begin_step(step, version, position)
        self._admit()
        for item in list(self._open.values()):
            if self._is_stale(item):
                self._leave_stale(item)
        while True:
            self._read_news()
            self._admit()
            if (chosen := self._choose()) is not None:
                break
            self._changed.clear()
            await self._changed.wait()
        taken = self._handed = self._hand_over(chosen)
        if self._bound == 0:
            await asyncio.gather(*self._cancelled, return_exceptions=True)
        return taken

    def in_flight(self, trained_step: int) -> RolloutBatch | None:
        """What a checkpoint after `trained_step` has to hold; None before anything was begun.

        Groups begun and not trained, with the episodes that have ended (episodes that run begin
        anew after a resume), those of a later step that was handed over to nobody first.
        `next_position` is the number of questions begun.
        """
        if self._position is None:
            return None
        untrained: list[Group] = []
        if self._handed is not None and self._handed.step > trained_step:
            untrained += self._handed.groups
        untrained += [item.so_far() for item in self._open.values()]
        untrained += [OpenGroup(0, job, finished).so_far() for job, finished in self._first]
        return RolloutBatch(trained_step, self._version, tuple(untrained), {}, self._position)

    def restore(self, saved: RolloutBatch) -> None:
        """Take over what `in_flight` gave, before the first `collect`.

        Raises:
            DataError: a group's row holds another question by now.
        """
        assert self._position is None, "only before anything is begun"
        self._position = saved.next_position
        for group in saved.groups:
            job = self._job_of(group)
            finished = {
                # It took its time in another process: it had ended when this one began.
                item.sample_index: replace(item, start_s=-item.duration_s)
                for item in group.episodes
                if item.sample_index < job.num_samples
            }
            self._first.append((job, finished))
        self._reserved = frozenset(job.uid for job, _ in self._first)

    async def close(self) -> None:
        """Cancel every episode, and wait until it is over."""
        for item in list(self._open.values()):
            self._remove(item)
        await asyncio.gather(*self._cancelled, return_exceptions=True)

    @property
    def _bound(self) -> int:
        return self._config.rollout.max_staleness

    def _begin_step(self, step: int, version: PolicyVersion, position: int) -> None:
        if self._position is None:
            self._position = position
        if not self._step:
            self._since_s = time.monotonic()
        if step != self._step:
            self._place, self._counts = 0, _Counts()
            if self._bound == 0:
                self._since_s = time.monotonic()
        self._step, self._version = step, version

    def _job_of(self, group: Group) -> GroupJob:
        rows, row = self._rows, group.row_index
        if not 0 <= row < len(rows) or rows[row].question != group.question:
            raise DataError(
                f"data.train: row {row} is not the question that the checkpoint has in flight "
                f"({group.question[:80]!r}); was the set changed? Resume with the set of the run, "
                "or start it again under another run.name"
            )
        return GroupJob(group.uid, row, rows[row], self._config.data.samples_per_prompt)

    def _admit(self) -> None:
        """Begin as many groups as there is room for."""
        while len(self._open) < self._most_open:
            if self._first:
                self._begin(*self._first.popleft())
                continue
            assert self._position is not None
            count = self._most_open - len(self._open)
            for job in train_jobs(
                self._config, self._rows, self._step, self._place, self._position, count
            ):
                self._begin(replace(job, uid=self._new_uid()), {})
            self._position += count

    def _new_uid(self) -> str:
        while True:
            uid = f"train-{self._step}-{self._place}"
            self._place += 1
            if uid not in self._reserved:
                return uid

    def _begin(self, job: GroupJob, finished: dict[int, Episode]) -> None:
        item = OpenGroup(self._serial, job, finished)
        item.begun_at = item.oldest
        self._serial += 1

        async def run(episode_id: str, question: Question) -> EpisodeTree:
            watched = item.watch(episode_id, self._policy(self._version), self._version)
            return await self._play(watched, episode_id, question)

        def end(task: asyncio.Task[Group]) -> None:
            self._cancelled.discard(task)
            if not task.cancelled():
                self._news.append(item)
                self._changed.set()

        with recording(self._sink) if self._sink is not None else nullcontext():
            item.task = asyncio.create_task(
                self._scheduler.run_group(job, run, dict(finished), item.keep), name=job.uid
            )
        item.task.add_done_callback(end)
        self._open[item.serial] = item

    def _remove(self, item: OpenGroup) -> None:
        """Forget a group; what still runs of it is cancelled."""
        del self._open[item.serial]
        if item.task is not None and not item.task.done():
            self._cancelled.add(item.task)
            item.task.cancel()

    def _read_news(self) -> None:
        """Look at the groups that have become complete since the last look.

        Among them the one that began first counts as the first.

        Raises:
            RolloutError: one could not: the judge refuses every request.
        """
        news, self._news = self._news, []
        config, prompts = self._config.rollout, self._config.data.prompts_per_step
        most = config.dynamic_sampling_max_rounds * prompts if config.dynamic_sampling else 0
        for item in sorted(news, key=lambda item: item.serial):
            if item.serial not in self._open:
                continue  # left, while its last episode ended
            assert item.task is not None
            group = item.task.result()
            item.completed = self._num_completed
            self._num_completed += 1
            if self._is_stale(item):
                self._leave_stale(item)
            elif not group.is_informative and len(self._counts.discarded) < most:
                self._counts.discarded.append(group)
                self._remove(item)

    def _is_stale(self, item: OpenGroup) -> bool:
        """Whether the group has a token that is too old for this step and so for all later ones."""
        oldest = item.oldest
        return oldest is not None and oldest < self._version - self._bound

    def _is_due(self, item: OpenGroup) -> bool:
        """Whether the group has, or may come to have, tokens too old for the next step."""
        return item.begun_at is not None and item.begun_at <= self._version - self._bound

    def _leave_stale(self, item: OpenGroup) -> None:
        self._remove(item)
        if self._config.rollout.on_stale == "drop":
            self._counts.dropped += 1
        else:
            self._counts.refreshed += 1
            self._first.append((replace(item.job, uid=self._new_uid()), {}))

    def _choose(self) -> list[OpenGroup] | None:
        """The step's groups in the order of the batch, or None while they are not complete.

        Those that would be too old for the next step come first, and with `rollout.on_stale=wait`
        they are waited for, as far as they fit.
        """
        num = self._config.data.prompts_per_step
        complete = [item for item in self._open.values() if item.completed >= 0]
        due = [item for item in complete if self._is_due(item)]
        is_waiting = self._config.rollout.on_stale == "wait" and any(
            item.completed < 0 and self._is_due(item) for item in self._open.values()
        )
        if len(complete) < num or (is_waiting and len(due) < num):
            return None
        order = sorted(complete, key=lambda item: (not self._is_due(item), item.completed))
        return sorted(order[:num], key=lambda item: item.serial)

    def _hand_over(self, chosen: Sequence[OpenGroup]) -> Taken:
        groups = [item.so_far() for item in chosen]
        for item in chosen:
            self._remove(item)
        self._check_failures(groups)
        if self._bound == 0:
            self._end_rest()
        began_s, now_s = self._since_s, time.monotonic()
        self._since_s = now_s
        assert self._position is not None
        return Taken(
            step=self._step,
            groups=[since(group, self._scheduler.began_s - began_s) for group in groups],
            metrics=self._metrics(groups),
            seconds=now_s - began_s,
            next_position=self._position,
            discarded=self._counts.discarded,
        )

    def _check_failures(self, groups: Sequence[Group]) -> None:
        failures = FailureBound(self._config.rollout)
        failures.expect(sum(len(group.episodes) for group in groups))
        for group in groups:
            for episode in group.episodes:
                if episode.failure:
                    failures.count(episode.failure)

    def _end_rest(self) -> None:
        """Nothing may sample until the next step, which asks these questions first."""
        for item in list(self._open.values()):
            self._remove(item)
            self._counts.ended += 1
            self._first.append((replace(item.job, uid=self._new_uid()), {}))

    def _metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        values: dict[str, float] = {}
        if self._config.rollout.over_sample and self._bound == 0:
            values["rollout/ended_groups"] = float(self._counts.ended)
        if self._bound:
            values |= staleness_metrics(groups, self._version)
            values |= {
                "rollout/in_flight_groups": float(len(self._open) + len(self._first)),
                "rollout/dropped_groups": float(self._counts.dropped),
                "rollout/refreshed_groups": float(self._counts.refreshed),
            }
        return values
