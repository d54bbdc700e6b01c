"""The trainer's model behind one small interface: score, update, export, save, restore.

Every method is collective: all trainer ranks call it, in the same order. Data-parallel replicas
bring their own micro-batches, equally many; ranks of one replica bring the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.errors import NonFiniteError
from megatron_matpo.megatron import hf_io, lora, lora_io, optimizer
from megatron_matpo.megatron.batch import MicroBatch
from megatron_matpo.megatron.checkpoint import Checkpoints
from megatron_matpo.megatron.host_weights import HostWeights
from megatron_matpo.megatron.model import build_model, unwrap, wrap_ddp
from megatron_matpo.megatron.nonfinite import Culprits, UpdateRefused, Watch, gather_culprits
from megatron_matpo.megatron.parallel import ParallelState, data_group, pipeline_group
from megatron_matpo.megatron.schedule import LossFn, forward_backward, forward_logprobs


@dataclass(frozen=True)
class UpdateResult:
    """What one optimizer update did; equal on all ranks."""

    loss: float
    """Sum of `loss_fn` over all micro-batches and ranks."""
    grad_norm: float
    """Before clipping."""
    lr: float
    metrics: dict[str, float] = field(default_factory=dict)
    """Sums (`/max`: maxima) over all tokens of all ranks; without `loss`."""


class MegatronActor:
    """Owns this rank's parameters and optimizer state."""

    def __init__(self, config: Config, hf: HfModelConfig, state: ParallelState) -> None:
        """Build model and optimizer; weights are undefined until `load_initial` or `restore`.

        Raises:
            ConfigError: the layout does not divide the model.
        """
        self._config, self._hf, self._state = config, hf, state
        self._models: list[Any] = wrap_ddp(config, build_model(config, hf, state))
        self._optimizer = optimizer.build_optimizer(config, self._models)
        self._checkpoints = Checkpoints(config, self._models, self._optimizer, state)
        self._reference: Callable[[], AbstractContextManager[None]] | None = None

    def load_initial(self) -> None:
        """Take the weights of `model.path`, or seeded random ones with `model.random_init`.

        Raises:
            ConfigError: the folder does not hold the model that its config.json describes.
        """
        if self._config.model.random_init:
            hf_io.init_random(self._models, self._hf, self._config.run.seed, self._state)
        else:
            hf_io.load_hf(self._models, self._hf, self._config.model.path, self._state)
        lora_io.init_adapters(self._models, self._config.run.seed, self._state)
        # The fp32 copies that a bf16 model trains were made from undefined weights.
        self._optimizer.reload_model_params()

    def load_reference(self) -> None:
        """Keep a frozen copy of `model.path`'s weights on the host, for `score_reference`.

        Passes through the model's own parameters, so it comes before `load_initial` or `restore`.
        With adapters there is nothing to keep: the model without them is the reference.

        Raises:
            ConfigError: the folder does not hold the model that its config.json describes.
        """
        if self._config.lora.rank:
            self._reference = partial(lora.switched_off, self._models)
            return
        hf_io.load_hf(self._models, self._hf, self._config.model.path, self._state)
        self._reference = HostWeights(self._models).swapped_in

    def score_reference(self, micro_batches: Sequence[MicroBatch]) -> list[tuple[Tensor, Tensor]]:
        """`score` as the reference of `load_reference`; the model is the policy again after it.

        Parameters come back bit for bit; optimizer state is not touched. Without adapters it takes
        the time of two copies of this rank's weights over the bus, and the memory of one more
        parameter.
        """
        assert self._reference is not None, "load_reference() was not called"
        with self._reference():
            return self.score(micro_batches)

    def score(self, micro_batches: Sequence[MicroBatch]) -> list[tuple[Tensor, Tensor]]:
        """Log-probs and entropies, [t] float32 on the CPU, 0 where the loss mask is 0."""
        for model in self._models:
            model.eval()
        return forward_logprobs(
            self._models,
            micro_batches,
            self._state,
            self._config,
            vocab_size=self._hf.vocab_size,
        )

    def update(
        self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn, update_index: int
    ) -> UpdateResult:
        """One optimizer update.

        Args:
            micro_batches: this replica's share of the update.
            loss_fn: see `schedule.LossFn`; already divided by the whole update's denominator.
            update_index: place in the schedule of the learning rate: updates made before this one.

        Raises:
            UpdateRefused: loss or gradient norm is not finite; parameters and optimizer state are
                as before, and the actor can be used further. Equal on all ranks.
        """
        watch = Watch(loss_fn)
        metrics = self._reduce(self._differentiate(micro_batches, watch))
        loss = metrics.pop("loss")
        try:
            if not math.isfinite(loss):
                raise NonFiniteError(f"loss {loss} at update {update_index}")
            grad_norm = optimizer.step(self._optimizer, self._config.optim, update_index)
        except NonFiniteError as error:
            culprits = gather_culprits([item.culprits() for item in watch.seen])
            culprits = culprits or self._locate(micro_batches, loss_fn)
            raise UpdateRefused(str(error), culprits, watch.seen) from error
        lr = optimizer.learning_rate(self._config.optim, update_index)
        return UpdateResult(loss, grad_norm, lr, metrics)

    def _differentiate(
        self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn, *, sum_grads: bool = True
    ) -> list[dict[str, Tensor]]:
        """`schedule.forward_backward` into empty gradient buffers."""
        for model in self._models:
            model.train()
            model.zero_grad_buffer()
        self._optimizer.zero_grad()
        return forward_backward(
            self._models,
            micro_batches,
            loss_fn,
            self._state,
            self._config,
            vocab_size=self._hf.vocab_size,
            sum_grads=sum_grads,
        )

    def _locate(self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn) -> Culprits:
        """Trajectories of the micro-batches whose own gradient is not finite.

        For an overflow inside the model, which no value of a trajectory shows: one backward pass
        for each micro-batch, without the sum over replicas.
        """
        found: list[Culprits] = []
        for batch in micro_batches:
            self._differentiate([batch], loss_fn, sum_grads=False)
            buffers = [
                buffer
                for model in self._models
                for buffer in (*model.buffers, *model.expert_parallel_buffers)
            ]
            if not all(bool(torch.isfinite(buffer.grad_data).all()) for buffer in buffers):
                found.append(dict.fromkeys(batch.sample_ids, ("weight_gradient",)))
        return gather_culprits(found)

    def _reduce(self, results: list[dict[str, Tensor]]) -> dict[str, float]:
        """Combine the metrics of all tokens of all replicas; equal on every rank."""
        reduced: list[Any] = [None]
        if self._state.is_last_stage:
            names = sorted(results[0])
            values = torch.stack(
                [torch.stack([r[name].float().reshape(()) for r in results]) for name in names]
            )
            is_max = torch.tensor([name.endswith("/max") for name in names], device=values.device)
            sums, maxima = values.sum(dim=1), values.amax(dim=1)
            if self._state.num_holders > 1:
                dist.all_reduce(sums, group=data_group())
                dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=data_group())
            combined = torch.where(is_max, maxima, sums).tolist()
            reduced = [dict(zip(names, combined, strict=True))]
        if self._state.pp_size > 1:
            group = pipeline_group()
            source = dist.get_global_rank(group, self._state.pp_size - 1)
            dist.broadcast_object_list(reduced, src=source, group=group)
        return reduced[0]

    def export(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Full tensors by Hugging Face name on rank 0; see `hf_io.iter_hf_tensors`."""
        return hf_io.iter_hf_tensors(self._models, self._hf, self._state, dtype)

    def save(
        self,
        folder: str | Path,
        step: int,
        extra: dict[str, Any],
        further: Mapping[str, bytes] | None = None,
    ) -> None:
        """Begin to write checkpoint `step` under `folder`; see `Checkpoints.save`."""
        self._checkpoints.save(folder, step, extra, further)

    @property
    def restored(self) -> Path | None:
        """The checkpoint that `restore` took over."""
        return self._checkpoints.restored

    def poll_save(self) -> None:
        """Complete a checkpoint whose files are written by now; see `CheckpointWriter.poll`."""
        self._checkpoints.poll()

    def finish_save(self) -> None:
        """Wait for the checkpoint that is being written; see `CheckpointWriter.wait`."""
        self._checkpoints.wait()

    def restore(self, folder: str | Path) -> dict[str, Any] | None:
        """Take the state that `checkpoint.load` names; None, and no change, if there is none.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another model.
        """
        return self._checkpoints.restore(folder)

    def save_hf(self, folder: str | Path) -> None:
        """Write the policy as a Hugging Face folder; see `hf_io.save_hf`."""
        hf_io.save_hf(self._models, self._hf, folder, self._state, self._config.model.path)

    def write_hf(self, folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Write what `export` gave to rank 0 as a Hugging Face folder; only rank 0 calls."""
        dtype = unwrap(self._models[0]).config.params_dtype
        hf_io.write_hf_folder(folder, tensors, self._hf, dtype, self._config.model.path)

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapter as PEFT does; see `lora_io.save_adapter`. Only with `lora.rank`."""
        lora_io.save_adapter(self._models, self._hf, self._config.lora, self._state, folder)
