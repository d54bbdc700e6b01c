"""One step's optimizer updates: samples -> micro-batches -> loss -> metrics. All ranks call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_matpo.algo.losses import (
    PolicyLossOptions,
    mismatch_metrics,
    policy_loss,
    supervised_loss,
    token_mean,
)
from megatron_matpo.config import Config
from megatron_matpo.data.schedule import num_trained_tokens, schedule, split_updates
from megatron_matpo.errors import RolloutError
from megatron_matpo.megatron.actor import MegatronActor, UpdateResult
from megatron_matpo.megatron.batch import MicroBatch
from megatron_matpo.megatron.parallel import ParallelState
from megatron_matpo.trainer.tensors import to_micro_batch
from megatron_matpo.types import TrainSample


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
    num_tokens: int
    """Trained tokens of the whole update, all ranks: the denominator of its loss."""


class PolicyLearner:
    """The policy-gradient step: N updates over one rollout batch."""

    def __init__(self, config: Config, actor: MegatronActor, state: ParallelState) -> None:
        """Keep the parts."""
        self._config = config
        self._actor = actor
        self._state = state

    def prepare(self, samples: Sequence[TrainSample]) -> list[Update]:
        """Split `samples` (the same list on every rank) into updates, with old log-probs.

        With one update the behaviour policy of the ratio is the current one, so old log-probs are
        the forward pass's own, detached, and no scoring pass is made; the same pass gives the
        mismatch between engine and trainer. With more updates and `algo.old_logprobs=trainer`, all
        samples are scored here, before the first update.

        Raises:
            RolloutError: there is nothing to train on.
        """
        if not samples:
            raise RolloutError(
                "the step has no trainable episode (rollout/failed says how many failed)"
            )
        updates = split_updates(samples, self._config.algo.updates_per_step)
        batches = [self._micro_batches(update) for update in updates]
        if len(updates) > 1 and self._config.algo.old_logprobs == "trainer":
            batches = [self._with_old_logprobs(batch) for batch in batches]
        return [
            Update(batch, num_trained_tokens(update))
            for update, batch in zip(updates, batches, strict=True)
        ]

    def learn(self, updates: Sequence[Update], first_update: int) -> LearnResult:
        """Make the updates.

        Args:
            updates: what `prepare` returned.
            first_update: optimizer updates made so far; sets the learning rate.

        Raises:
            NonFiniteError: before the optimizer moves.
        """
        results = [
            self._update(update, first_update + i, len(updates)) for i, update in enumerate(updates)
        ]
        return LearnResult(_combine(results), len(results))

    def _micro_batches(self, samples: Sequence[TrainSample]) -> list[MicroBatch]:
        bins = schedule(samples, self._config.train.micro_batch_tokens, self._state.dp_size)
        return [to_micro_batch(item, self._state.device) for item in bins[self._state.dp_rank]]

    def _with_old_logprobs(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        scored = self._actor.score(batches)
        return [
            replace(batch, old_logprobs=logprobs.to(batch.old_logprobs))
            for batch, (logprobs, _) in zip(batches, scored, strict=True)
        ]

    def _update(self, update: Update, update_index: int, num_updates: int) -> UpdateResult:
        algo = self._config.algo
        options = PolicyLossOptions(algo.clip_low, algo.clip_high, algo.dual_clip)
        own_old = num_updates == 1 and algo.old_logprobs == "trainer"
        denominator = float(max(1, update.num_tokens))

        def loss_fn(
            logprobs: Tensor, entropy: Tensor, batch: MicroBatch
        ) -> tuple[Tensor, dict[str, Tensor]]:
            loss, metrics = policy_loss(
                logprobs,
                logprobs.detach() if own_old else batch.old_logprobs,
                batch.advantages,
                batch.loss_mask,
                denominator=denominator,
                options=options,
            )
            metrics |= mismatch_metrics(
                logprobs, batch.rollout_logprobs, batch.loss_mask, denominator=denominator
            )
            metrics["policy/entropy"] = token_mean(
                entropy, batch.loss_mask, denominator=denominator
            )
            return loss, metrics

        return self._actor.update(update.batches, loss_fn, update_index)


class SupervisedLearner:
    """The supervised step: one update, negative log-likelihood of the assistant's tokens."""

    def __init__(self, config: Config, actor: MegatronActor, state: ParallelState) -> None:
        """Keep the parts."""
        self._config = config
        self._actor = actor
        self._state = state

    def learn(self, samples: Sequence[TrainSample], first_update: int) -> LearnResult:
        """Train on `samples` once (the same list on every rank)."""
        denominator = float(max(1, num_trained_tokens(samples)))
        bins = schedule(samples, self._config.train.micro_batch_tokens, self._state.dp_size)
        batches = [to_micro_batch(item, self._state.device) for item in bins[self._state.dp_rank]]

        def loss_fn(
            logprobs: Tensor, entropy: Tensor, batch: MicroBatch
        ) -> tuple[Tensor, dict[str, Tensor]]:
            loss = supervised_loss(logprobs, batch.loss_mask, denominator=denominator)
            mean_entropy = token_mean(entropy, batch.loss_mask, denominator=denominator)
            return loss, {"loss/sft": loss.detach(), "policy/entropy": mean_entropy}

        return LearnResult(_combine([self._actor.update(batches, loss_fn, first_update)]), 1)


def _combine(results: Sequence[UpdateResult]) -> dict[str, float]:
    """Mean over a step's updates; maxima stay maxima, and mismatch is the first update's.

    Only the first update runs with the weights that sampled the tokens, so only its difference to
    the engine is a mismatch; later ones differ because the policy moved.
    """
    combined: dict[str, float] = {}
    for name in results[0].metrics if results else ():
        values = [result.metrics[name] for result in results]
        combined[name] = values[0] if name.startswith("mismatch/") else sum(values) / len(values)
    if results:
        norms = [result.grad_norm for result in results]
        combined["optim/grad_norm"] = sum(norms) / len(norms)
        combined["optim/lr"] = results[-1].lr
    return combined
