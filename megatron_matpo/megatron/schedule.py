"""Forward and backward passes over a list of micro-batches, through Megatron's schedules.

Invariants:

* gradients are the plain sum over micro-batches and data-parallel ranks of the gradients of what
  `loss_fn` returns; whoever calls has divided by the denominator of the whole update;
* results are the same on every rank of a data-parallel replica.

Letters in shapes: b sequences, s tokens, n tokens whose loss mask is not 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_matpo.config import Config
from megatron_matpo.megatron.batch import MicroBatch
from megatron_matpo.megatron.logprobs import vocab_parallel_logprobs
from megatron_matpo.megatron.model import PolicyModel, unwrap
from megatron_matpo.megatron.parallel import ParallelState, pipeline_group, tensor_group

LossFn = Callable[[Tensor, Tensor, MicroBatch], tuple[Tensor, dict[str, Tensor]]]
"""(logprobs [b, s] float32, entropy [b, s] float32, micro-batch) -> (loss [], metrics of scalars).

The loss is this micro-batch's share of the update's loss: a sum divided by the denominator of the
whole update, over all micro-batches and data-parallel ranks. Metrics are shares of the same kind
and are summed; a metric whose name ends in `/max` is reduced by maximum.
"""


def _sum_grads(models: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's reduction of gradients, without its division by the number of tokens."""
    finalize_model_grads(models, None, **kwargs)


def micro_batch_logprobs(
    model: PolicyModel, hidden: Tensor, batch: MicroBatch, config: Config, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies where the loss mask is not 0, and 0 elsewhere.

    Last stage only; its tensor-parallel ranks call together.

    Args:
        model: the unwrapped chunk that holds the output layer.
        hidden: [s, b, h] final hidden states.
        batch: the micro-batch that they belong to.
        config: gives `rollout.temperature` and `train.logprob_chunk_tokens`.
        vocab_size: real vocabulary.

    Returns:
        Two float32 tensors [b, s]; gradients flow through the first.
    """
    trained = batch.loss_mask.reshape(-1) != 0
    rows = trained.nonzero().squeeze(1)
    if rows.numel() == 0:
        # Some row must go through the output layer, or the backward pass has nothing to start from.
        rows = rows.new_zeros(1)
    b, s = batch.labels.shape
    # Row b*s in the order of the micro-batch is row (s, b) of the hidden states.
    chosen = hidden.reshape(s * b, -1).index_select(0, (rows % s) * b + rows // s)
    logprobs, entropy = vocab_parallel_logprobs(
        chosen,
        model.output_weight(),
        batch.labels.reshape(-1)[rows],
        vocab_size=vocab_size,
        temperature=config.rollout.temperature,
        tp_group=tensor_group(),
        chunk_tokens=config.train.logprob_chunk_tokens,
    )
    keep = trained[rows].to(logprobs.dtype)
    empty = logprobs.new_zeros(b * s)
    return (
        empty.index_copy(0, rows, logprobs * keep).view(b, s),
        empty.index_copy(0, rows, entropy * keep).view(b, s),
    )


class _Pass:
    """One pass of the schedule over the micro-batches of this data-parallel rank."""

    def __init__(
        self,
        models: Sequence[Any],
        micro_batches: Sequence[MicroBatch],
        state: ParallelState,
        config: Config,
        vocab_size: int,
    ) -> None:
        assert micro_batches, "a pass needs at least one micro-batch; use empty_micro_batch()"
        self._models = list(models)
        self._batches = [batch.to(state.device) for batch in micro_batches]
        self._state, self._config, self._vocab_size = state, config, vocab_size

    def run(self, loss_fn: LossFn | None, *, sum_grads: bool = True) -> list[Any]:
        """Per micro-batch, on the last stage: metrics, or (logprobs, entropy) without `loss_fn`."""
        first = self._batches[0]
        for model in self._models:
            unwrap(model).config.finalize_model_grads_func = _sum_grads if sum_grads else None
        return get_forward_backward_func()(
            forward_step_func=self._forward_step(loss_fn),
            data_iterator=iter(self._batches),
            model=self._models,
            num_microbatches=len(self._batches),
            # Read only where all micro-batches have one shape; see variable_seq_lengths.
            seq_length=first.input_ids.shape[1],
            micro_batch_size=first.input_ids.shape[0],
            forward_only=loss_fn is None,
            collect_non_loss_data=loss_fn is None,
        )

    def _forward_step(self, loss_fn: LossFn | None) -> Callable[..., Any]:
        def forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
            batch = next(batches)
            hidden = model(batch.input_ids, batch.position_ids, None)
            if not self._state.is_last_stage:
                return hidden, None
            logprobs, entropy = micro_batch_logprobs(
                unwrap(model), hidden, batch, self._config, self._vocab_size
            )

            def finish(_: Tensor, non_loss_data: bool = False) -> Any:
                if non_loss_data or loss_fn is None:
                    return logprobs, entropy
                loss, metrics = loss_fn(logprobs, entropy, batch)
                metrics = {name: value.detach() for name, value in metrics.items()}
                # With calculate_per_token_loss this triple reaches the backward pass unscaled.
                return loss, torch.zeros((), dtype=torch.int, device=loss.device), (loss, metrics)

            return logprobs, finish

        return forward_step


def forward_logprobs(
    models: Sequence[Any],
    micro_batches: Sequence[MicroBatch],
    state: ParallelState,
    config: Config,
    *,
    vocab_size: int,
) -> list[tuple[Tensor, Tensor]]:
    """Score micro-batches without gradients. Every rank calls, each replica with its own batches.

    Returns:
        Per micro-batch (logprobs [b, s], entropy [b, s]), float32 on the CPU, on every rank; 0
        where the loss mask is 0.
    """
    with torch.no_grad():
        results = _Pass(models, micro_batches, state, config, vocab_size).run(None)
    shapes = [batch.labels.shape for batch in micro_batches]
    numel = sum(shape.numel() for shape in shapes)
    if state.is_last_stage:
        flat = torch.cat([t.reshape(-1) for pair in results for t in pair])
    else:
        flat = torch.empty(2 * numel, dtype=torch.float32, device=state.device)
    if state.pp_size > 1:
        group = pipeline_group()
        dist.broadcast(flat, src=dist.get_global_rank(group, state.pp_size - 1), group=group)
    parts = iter(flat.cpu().split([shape.numel() for shape in shapes for _ in range(2)]))
    return [(next(parts).view(shape), next(parts).view(shape)) for shape in shapes]


def forward_backward(
    models: Sequence[Any],
    micro_batches: Sequence[MicroBatch],
    loss_fn: LossFn,
    state: ParallelState,
    config: Config,
    *,
    vocab_size: int,
    sum_grads: bool = True,
) -> list[dict[str, Tensor]]:
    """Accumulate and reduce gradients. Every rank calls; replicas bring equally many micro-batches.

    Afterwards the DDP buffers hold the sum over micro-batches and data-parallel ranks (each rank
    its shard of it, as Megatron's distributed optimizer wants). Buffers must be zero before. With
    `sum_grads` off they hold what this rank's own micro-batches gave.

    Returns:
        On the last stage, per micro-batch, the metrics of `loss_fn` and its value as `loss`; on
        other stages an empty list.
    """
    results = _Pass(models, micro_batches, state, config, vocab_size).run(
        loss_fn, sum_grads=sum_grads
    )
    return [{"loss": loss.detach(), **metrics} for loss, metrics in results]
