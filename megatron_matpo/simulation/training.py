"""Seconds of everything in a step that is not the rollout, from operations and bytes.

    update = max over replicas of (FLOPs made / (ranks x peak x MFU)) / (1 - bubble)
             + micro-batches x micro_batch_s + update_s + gradients and parameters over the network

FLOPs are those of `config/flops.py`, with recomputation; a replica has its even share of an update,
but never less than the longest trajectory. With `parallel.virtual` above 1 micro-batches are padded
to one shape, and the padding is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_matpo.config import Config
from megatron_matpo.config.flops import Shape, forward_flops, training_flops
from megatron_matpo.config.gpus import Gpu
from megatron_matpo.errors import ConfigError
from megatron_matpo.planning.batches import Workload, micro_batches_per_rank
from megatron_matpo.planning.layouts import feed_forward_share
from megatron_matpo.planning.ledger import worst_stage
from megatron_matpo.planning.parameters import num_parameters, total_parameters
from megatron_matpo.planning.pipeline import bubble_frac
from megatron_matpo.planning.shape import Job
from megatron_matpo.simulation.episodes import Agent, all_agents
from megatron_matpo.simulation.rates import MoveRates, TrainRates

_FROZEN = 2 / 3
"""Of the operations with adapters: no gradients of the weights are made. The adapters' own are
less than a hundredth and are left out."""
_OPTIMIZER_BYTES = 12
"""Per parameter in a checkpoint: fp32 weights and the two moments of Adam."""


@dataclass(frozen=True)
class Phases:
    """Seconds of a step's phases after the rollout."""

    score_s: float
    train_s: float
    sync_s: float
    checkpoint_s: float
    """On average over the steps; what the training waits for."""
    other_s: float

    @property
    def total_s(self) -> float:
        """All of them, one after the other."""
        return self.score_s + self.train_s + self.sync_s + self.checkpoint_s + self.other_s


@dataclass(frozen=True)
class Trainer:
    """A trainer and its rates."""

    config: Config
    job: Job
    gpu: Gpu | None
    train: TrainRates
    move: MoveRates

    @property
    def device_flops(self) -> float:
        """Operations per second that one rank makes while it computes.

        Raises:
            ConfigError: the rates do not say.
        """
        if self.train.tflops_per_device:
            return self.train.tflops_per_device * 1e12
        is_fp8 = bool(self.job.fp8_recipe) and self.gpu is not None and self.gpu.fp8_tflops > 0
        share = self.train.mfu_fp8 if is_fp8 else self.train.mfu
        if self.gpu is None or not share:
            name = "train.mfu_fp8" if is_fp8 else "train.mfu"
            raise ConfigError(f"rates: expected {name} (of a GPU) or train.tflops_per_device")
        return share * 1e12 * (self.gpu.fp8_tflops if is_fp8 else self.gpu.bf16_tflops)

    def phases(self, episodes: Sequence[Agent], *, colocated: bool = False) -> Phases:
        """Of a step that trains on `episodes`."""
        agents = all_agents(episodes)
        lengths = [agent.num_tokens for agent in agents]
        trained = sum(agent.num_sampled for agent in agents)
        updates = self.num_updates(len(episodes), len(agents))
        return Phases(
            score_s=self._score_s(lengths, trained, updates),
            train_s=self._train_s(lengths, trained, updates),
            sync_s=self.sync_s(colocated=colocated),
            checkpoint_s=self._checkpoint_s(),
            other_s=self.train.step_s,
        )

    def num_updates(self, num_episodes: int, num_contexts: int) -> int:
        """Of a step; with `compat: reference` workers make more of them, as `data/schedule.py`."""
        updates = self.config.algo.updates_per_step
        if self.config.compat != "reference":
            return min(updates, num_episodes)
        return math.ceil(num_contexts / max(1, math.ceil(num_episodes / updates)))

    def micro_batches(self, lengths: Sequence[int], updates: int) -> int:
        """Of one of `updates` updates, on one data-parallel rank."""
        workload = Workload(tuple(lengths), "")
        budget = self.config.train.micro_batch_tokens
        return micro_batches_per_rank(workload, budget, self.job.layout.data, updates)

    def switch_s(self, engine_weight_bytes: int) -> float:
        """Handing the GPUs from trainer to engines and back: trainer state out and in again."""
        if not self.move.host_gb_s:
            return 2 * self.move.switch_s
        static = worst_stage(self.job, 1).static
        moved = 2 * static + engine_weight_bytes
        return 2 * self.move.switch_s + moved / (self.move.host_gb_s * 1e9)

    def sync_s(self, *, colocated: bool = False) -> float:
        """The whole model from the trainer to all engines."""
        if self.config.weight_sync.transport == "none":
            return 0.0
        speed = self.move.colocated_push_gb_s if colocated else self.move.push_gb_s
        num_bytes = total_parameters(self.job) * self.job.element_bytes
        return self.move.push_s + (num_bytes / (speed * 1e9) if speed else 0.0)

    def _train_s(self, lengths: Sequence[int], trained: int, updates: int) -> float:
        layout, shape = self.job.layout, Shape.of(self.job.hf)
        flops = training_flops(shape, lengths, trained) / updates
        longest = training_flops(shape, [max(lengths)], 0)
        again = {"none": 0.0, "selective": feed_forward_share(self.job.hf), "full": 1.0}
        passes = (_FROZEN if self.config.lora.rank else 1.0) + again[layout.recompute] / 3
        work = max(flops / layout.data, longest) * passes
        count = self.micro_batches(lengths, updates)
        if layout.virtual > 1:
            budget = self.config.train.micro_batch_tokens
            work *= max(1.0, count * budget * layout.data * updates / sum(lengths))
        ranks = layout.tensor * layout.context * layout.pipeline
        busy = work / ranks / self.device_flops + count * self.train.micro_batch_s
        bubble = bubble_frac(layout, count)
        return updates * (busy / (1 - bubble) + self.train.update_s + self._network_s())

    def _score_s(self, lengths: Sequence[int], trained: int, updates: int) -> float:
        """Forward passes over all trajectories: old log-probs, and those of the reference model."""
        algo, layout = self.config.algo, self.job.layout
        passes = int(updates > 1 and algo.old_logprobs == "trainer")
        passes += algo.kl_coef > 0
        if not passes:
            return 0.0
        shape = Shape.of(self.job.hf)
        flops = forward_flops(shape, lengths, trained) / layout.data
        work = max(flops, forward_flops(shape, [max(lengths)], 0))
        count = self.micro_batches(lengths, updates) * updates
        ranks = layout.tensor * layout.context * layout.pipeline
        busy = work / ranks / self.device_flops + count * self.train.micro_batch_s / 3
        return passes * busy / (1 - bubble_frac(layout, count))

    def _network_s(self) -> float:
        """Gradients reduced and parameters gathered among the replicas, not overlapped."""
        layout = self.job.layout
        if not self.train.network_gb_s or layout.optimizer_ranks == 1 or self.config.lora.rank:
            return 0.0
        worst = max(num_parameters(self.job, stage) for stage in (0, layout.pipeline - 1))
        share = (layout.optimizer_ranks - 1) / layout.optimizer_ranks
        moved = worst * (4 + self.job.element_bytes) * share
        return moved / (self.train.network_gb_s * 1e9)

    def _checkpoint_s(self) -> float:
        every = self.config.checkpoint.every
        if not every or self.config.lora.rank:  # adapters are small
            return 0.0
        per_parameter = self.job.element_bytes + _OPTIMIZER_BYTES
        num_bytes = total_parameters(self.job) * per_parameter
        if self.config.checkpoint.asynchronous:
            ranks = self.job.layout.world_size
            speed = self.move.host_gb_s * ranks
        else:
            speed = self.move.write_gb_s
        return num_bytes / (speed * 1e9) / every if speed else 0.0
