"""One step's optimizer updates: samples -> micro-batches -> loss -> metrics. All ranks call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from megatron_matpo.algo.losses import (
    PolicyLossOptions,
    importance_weights,
    kl_penalty,
    policy_loss,
    supervised_loss,
)
from megatron_matpo.algo.token_metrics import (
    TokenCounts,
    TokenMeans,
    importance_metrics,
    mismatch_metrics,
    policy_metrics,
    with_sample_sizes,
)
from megatron_matpo.config import Config
from megatron_matpo.config.algo import AlgoConfig
from megatron_matpo.data.schedule import (
    num_tokens,
    num_trained_tokens,
    packed_room,
    reference_rows,
    schedule,
    split_by_trajectories,
    split_updates,
    total_weight,
    weigh,
)
from megatron_matpo.errors import RolloutError
from megatron_matpo.megatron.actor import MegatronActor, UpdateResult
from megatron_matpo.megatron.batch import MicroBatch
from megatron_matpo.megatron.memory import PeakMemory
from megatron_matpo.megatron.parallel import ParallelState
from megatron_matpo.megatron.schedule import LossFn
from megatron_matpo.obs.metrics import REQUIRED
from megatron_matpo.trainer.nonfinite import NonFinitePolicy
from megatron_matpo.trainer.tensors import to_micro_batch
from megatron_matpo.types import TrainSample

Scorer = Callable[[Sequence[MicroBatch]], list[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class LearnResult:
    """What the updates of one step did."""

    metrics: dict[str, float]
    num_updates: int


@dataclass(frozen=True)
class Update:
    """One optimizer update, as this rank sees it."""

    batches: list[MicroBatch]
    """Of this data-parallel rank."""
    denominator: float
    """Of the loss: sum of the loss weights of the whole update, all ranks."""
    is_on_policy: bool
    """Old log-probs of the ratio are the forward pass's own, detached."""
    counts: TokenCounts
    """Of the whole step, all updates and ranks: denominators of token means."""
    mismatch_counts: TokenCounts | None
    """Of all updates in which the trainer's log-probs of the sampling weights are known; None in an
    update in which they are not."""
    num_tokens: int
    """Of the samples of the update, all ranks."""
    room_tokens: int
    """What its micro-batches have room for, all ranks."""


def packed(
    samples: Sequence[TrainSample], config: Config, state: ParallelState
) -> tuple[list[MicroBatch], int]:
    """This data-parallel rank's micro-batches of an update, and all ranks' room in tokens."""
    budget = config.train.micro_batch_tokens
    plan = schedule(samples, budget, state.dp_size, state.sample_multiple)
    batches = [to_micro_batch(item, state.device) for item in plan[state.dp_rank]]
    return batches, packed_room(plan, budget)


class PolicyLearner:
    """The policy-gradient step: N updates over one rollout batch."""

    def __init__(
        self, config: Config, actor: MegatronActor, state: ParallelState, run_dir: Path
    ) -> None:
        """Keep the parts; batches of refused updates go to `run_dir`."""
        self._config = config
        self._actor = actor
        self._state = state
        self._policy = NonFinitePolicy(config.train, run_dir, state)
        self._memory = PeakMemory(config, state.pp_rank)

    def prepare(self, samples: Sequence[TrainSample]) -> list[Update]:
        """Split `samples` (the same list on every rank) into updates, with log-probs to compare to.

        With one update the behaviour policy of the ratio is the current one, so old log-probs are
        the forward pass's own, detached, and no scoring pass is made; the same pass gives the
        mismatch between engine and trainer. With more updates and `algo.old_logprobs=trainer`, all
        samples are scored here, before the first update. With a KL penalty the reference model
        scores them too.

        Raises:
            RolloutError: there is nothing to train on.
        """
        if not samples:
            raise RolloutError(
                "the step has no trainable episode (rollout/failed says how many failed)"
            )
        algo = self._config.algo
        splits, denominators = self._split(samples)
        batches, rooms = zip(
            *(packed(split, self._config, self._state) for split in splits), strict=True
        )
        is_on_policy = len(splits) == 1 and algo.old_logprobs == "trainer"
        if algo.old_logprobs == "trainer" and not is_on_policy:
            batches = [
                [replace(b, old_logprobs=scored.to(b.old_logprobs)) for b, scored in pairs]
                for pairs in _scored(batches, self._actor.score)
            ]
        if algo.kl_coef > 0:
            batches = [
                [replace(b, reference_logprobs=scored.to(b.old_logprobs)) for b, scored in pairs]
                for pairs in _scored(batches, self._actor.score_reference)
            ]
        # With the engine's old log-probs, only the first update's forward pass has the weights
        # that sampled the tokens; later ones differ because the policy moved.
        measured = splits if algo.old_logprobs == "trainer" else splits[:1]
        mismatch_counts = TokenCounts.of([sample for split in measured for sample in split])
        return [
            Update(
                batches=batches[i],
                denominator=denominators[i],
                is_on_policy=is_on_policy,
                counts=TokenCounts.of(samples),
                mismatch_counts=mismatch_counts if i < len(measured) else None,
                num_tokens=num_tokens(splits[i]),
                room_tokens=rooms[i],
            )
            for i in range(len(splits))
        ]

    def learn(
        self, updates: Sequence[Update], first_update: int, finished_steps: int
    ) -> LearnResult:
        """Make the updates.

        Args:
            updates: what `prepare` returned.
            first_update: optimizer updates made so far; sets the learning rate.
            finished_steps: steps made so far; with `compat: reference` sets the learning rate,
                which the original's scheduler moves once per step.

        Raises:
            NonFiniteError: before the optimizer moves; with `train.on_non_finite=skip` only after
                too many updates were skipped in a row.
        """
        results: list[UpdateResult] = []
        for index, update in enumerate(updates):
            place = first_update + len(results)
            if self._config.compat == "reference":
                place = finished_steps
            result = self._policy.attempt(
                partial(
                    self._actor.update,
                    update.batches,
                    policy_loss_fn(self._config.algo, update),
                    place,
                ),
                step=finished_steps + 1,
                index=index,
            )
            if result is not None:
                results.append(result)
        packing = sum(u.num_tokens for u in updates) / sum(u.room_tokens for u in updates)
        most = max((len(update.batches) for update in updates), default=1)
        metrics = with_sample_sizes(_combine(results)) | {"train/packing_efficiency": packing}
        metrics |= self._memory.metrics(most)
        return _learned(metrics, len(results), len(updates) - len(results))

    def _split(self, samples: Sequence[TrainSample]) -> tuple[list[list[TrainSample]], list[float]]:
        """Weighted samples of each update, and the denominators of their losses."""
        algo = self._config.algo
        if self._config.compat == "reference":
            splits = split_by_trajectories(samples, algo.updates_per_step)
            rows = reference_rows(samples, algo.updates_per_step)
            # A last update that is not full has a smaller loss (`dp_actor.py:442-444`).
            return splits, [total_weight(split) * rows / len(split) for split in splits]
        splits = [
            weigh(split, algo.aggregation)
            for split in split_updates(samples, algo.updates_per_step)
        ]
        return splits, [total_weight(split) for split in splits]


def policy_loss_fn(algo: AlgoConfig, update: Update) -> LossFn:
    """The loss of one micro-batch of `update`, with its metrics.

    loss = -(clipped surrogate x importance weight) + `algo.kl_coef` x KL estimate, both weighted
    and divided as `algo.aggregation` says.
    """
    options = PolicyLossOptions(algo.clip_low, algo.clip_high, algo.dual_clip)

    def loss_fn(
        logprobs: Tensor, entropy: Tensor, batch: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        means = TokenMeans(batch.loss_mask, batch.is_worker, update.counts)
        old = logprobs.detach() if update.is_on_policy else batch.old_logprobs
        importance = None
        metrics: dict[str, Tensor] = {}
        if algo.tis != "off":
            importance = importance_weights(
                old, batch.rollout_logprobs, mode=algo.tis, cap=algo.tis_cap
            )
            metrics |= importance_metrics(importance, means)
        loss, ratio, outside = policy_loss(
            logprobs,
            old,
            batch.advantages,
            batch.loss_weights,
            denominator=update.denominator,
            options=options,
            importance=importance,
        )
        metrics["loss/policy"] = loss
        if batch.reference_logprobs is not None:
            kl = kl_penalty(logprobs, batch.reference_logprobs, algo.kl_estimator)
            penalty = algo.kl_coef * (kl * batch.loss_weights).sum() / update.denominator
            loss = loss + penalty
            metrics |= {"loss/kl": penalty, **policy_metrics(means, {"kl": kl})}
        if update.mismatch_counts is not None:
            metrics |= mismatch_metrics(
                logprobs if algo.old_logprobs == "engine" else old,
                batch.rollout_logprobs,
                replace(means, counts=update.mismatch_counts),
                batch.is_current,
            )
        values = {"ratio": ratio, "clip_frac": outside, "entropy": entropy}
        return loss, metrics | policy_metrics(means, values)

    return loss_fn


def _scored(
    updates: Sequence[list[MicroBatch]], score: Scorer
) -> list[list[tuple[MicroBatch, Tensor]]]:
    """Every micro-batch with its log-probs, in one pass over all updates."""
    flat = iter(score([batch for update in updates for batch in update]))
    return [[(batch, next(flat)[0]) for batch in update] for update in updates]


class SupervisedLearner:
    """The supervised step: one update, negative log-likelihood of the assistant's tokens."""

    def __init__(
        self, config: Config, actor: MegatronActor, state: ParallelState, run_dir: Path
    ) -> None:
        """Keep the parts; batches of refused updates go to `run_dir`."""
        self._config = config
        self._actor = actor
        self._state = state
        self._policy = NonFinitePolicy(config.train, run_dir, state)

    def learn(self, samples: Sequence[TrainSample], first_update: int) -> LearnResult:
        """Train on `samples` once (the same list on every rank)."""
        denominator = float(max(1, num_trained_tokens(samples)))
        batches, room = packed(samples, self._config, self._state)

        def loss_fn(
            logprobs: Tensor, entropy: Tensor, batch: MicroBatch
        ) -> tuple[Tensor, dict[str, Tensor]]:
            loss = supervised_loss(logprobs, batch.loss_mask, denominator=denominator)
            mean_entropy = (entropy * batch.loss_mask).sum() / denominator
            return loss, {"loss/sft": loss, "policy/entropy": mean_entropy}

        result = self._policy.attempt(
            partial(self._actor.update, batches, loss_fn, first_update),
            step=first_update + 1,
            index=0,
        )
        made = [] if result is None else [result]
        metrics = _combine(made) | {"train/packing_efficiency": num_tokens(samples) / room}
        return _learned(metrics, len(made), 1 - len(made))


def _learned(metrics: dict[str, float], num_made: int, num_skipped: int) -> LearnResult:
    """The step's result; what skipped updates would have given is NaN where nothing else did."""
    if num_skipped:
        own = ("policy/", "loss/", "mismatch/", "optim/")
        required = [name for name in REQUIRED if name.startswith(own)]
        metrics = {**dict.fromkeys(required, math.nan), **metrics}
    return LearnResult({**metrics, "optim/skipped_updates": num_skipped}, num_made)


def _combine(results: Sequence[UpdateResult]) -> dict[str, float]:
    """One line for a step's updates.

    Losses are means over the updates; token means have the whole step's denominators, so their
    shares are added; maxima stay maxima.
    """
    combined: dict[str, float] = {}
    for name in dict.fromkeys(name for result in results for name in result.metrics):
        values = [result.metrics[name] for result in results if name in result.metrics]
        if name.endswith("/max"):
            combined[name] = max(values)
        elif name.startswith("loss/"):
            combined[name] = sum(values) / len(values)
        else:
            combined[name] = sum(values)
    if results:
        norms = [result.grad_norm for result in results]
        combined["optim/grad_norm"] = sum(norms) / len(norms)
        combined["optim/lr"] = results[-1].lr
    return combined
