"""Forward and backward passes over a list of micro-batches, through Megatron's schedules.

Invariants:

* gradients are the plain sum over micro-batches, data- and context-parallel ranks of the gradients
  of what `loss_fn` returns; whoever calls has divided by the denominator of the whole update;
* results of scoring are the same on every rank of a data-parallel replica;
* under context parallelism `loss_fn` sees the tokens of one rank, and its sums are over those too.

Letters in shapes: t tokens of a packed row that this rank computes, h hidden size.
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
from megatron_matpo.megatron.attention import packed_params
from megatron_matpo.megatron.batch import (
    MicroBatch,
    PlacedBatch,
    empty_micro_batch,
    place,
    row_tokens,
)
from megatron_matpo.megatron.logprobs import vocab_parallel_logprobs
from megatron_matpo.megatron.model import PolicyModel, unwrap
from megatron_matpo.megatron.parallel import (
    ParallelState,
    context_group,
    pipeline_group,
    tensor_group,
)

LossFn = Callable[[Tensor, Tensor, MicroBatch], tuple[Tensor, dict[str, Tensor]]]
"""(logprobs [t] float32, entropy [t] float32, micro-batch) -> (loss [], metrics of scalars).

The loss is the share that these tokens have in the update's loss: a sum divided by the denominator
of the whole update, over all micro-batches and ranks. Metrics are shares of the same kind and are
summed; a metric whose name ends in `/max` is reduced by maximum.
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
        hidden: [t, 1, h] final hidden states.
        batch: the tokens that they belong to.
        config: gives `rollout.temperature` and `train.logprob_chunk_tokens`.
        vocab_size: real vocabulary.

    Returns:
        Two float32 tensors [t]; gradients flow through the first.
    """
    trained = batch.loss_mask != 0
    rows = trained.nonzero().squeeze(1)
    if rows.numel() == 0:
        # Some row must go through the output layer, or the backward pass has nothing to start from.
        rows = rows.new_zeros(1)
    logprobs, entropy = vocab_parallel_logprobs(
        hidden.squeeze(1).index_select(0, rows),
        model.output_weight(),
        batch.labels[rows],
        vocab_size=vocab_size,
        temperature=config.rollout.temperature,
        tp_group=tensor_group(),
        chunk_tokens=config.train.logprob_chunk_tokens,
    )
    keep = trained[rows].to(logprobs.dtype)
    empty = logprobs.new_zeros(trained.shape)
    return (
        empty.index_copy(0, rows, logprobs * keep),
        empty.index_copy(0, rows, entropy * keep),
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
        self._num_real = len(micro_batches)
        # The interleaved schedule takes the micro-batches in groups of one for each stage.
        has_chunks = len(self._models) > 1
        num_more = -self._num_real % state.pp_size if has_chunks else 0
        batches = [*micro_batches, *[empty_micro_batch()] * num_more]
        # And it exchanges one shape only: see `transformer_config`.
        self._width = max(row_tokens(batch, state) for batch in batches) if has_chunks else 0
        self._batches = [place(batch.to(state.device), state, self._width) for batch in batches]
        self._state, self._config, self._vocab_size = state, config, vocab_size

    @property
    def sources(self) -> list[Tensor]:
        """Per micro-batch, where this rank's tokens come from; see `PlacedBatch`."""
        return [placed.source for placed in self._batches[: self._num_real]]

    def run(self, loss_fn: LossFn | None, *, sum_grads: bool = True) -> list[Any]:
        """Per micro-batch, on the last stage: metrics, or (logprobs, entropy) without `loss_fn`."""
        for model in self._models:
            unwrap(model).config.finalize_model_grads_func = _sum_grads if sum_grads else None
        # The interleaved schedule goes through the micro-batches once for each chunk of the model.
        iterators = [iter(self._batches) for _ in self._models]
        results = get_forward_backward_func()(
            forward_step_func=self._forward_step(loss_fn),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._models,
            num_microbatches=len(self._batches),
            # Read only where all micro-batches have one shape; see variable_seq_lengths.
            seq_length=self._width or sum(self._batches[0].segments),
            micro_batch_size=1,
            forward_only=loss_fn is None,
            collect_non_loss_data=loss_fn is None,
        )
        return results[: self._num_real]

    def _forward_step(self, loss_fn: LossFn | None) -> Callable[..., Any]:
        def forward_step(batches: Iterator[PlacedBatch], model: Any) -> tuple[Tensor, Any]:
            placed = next(batches)
            batch = placed.batch
            # Positions inside a sample follow from where it begins, so none are given.
            hidden = model(
                batch.input_ids[None], None, None, packed_seq_params=packed_params(placed)
            )
            chunk = unwrap(model)
            if not chunk.post_process:
                return hidden, None
            logprobs, entropy = micro_batch_logprobs(
                chunk, hidden, batch, self._config, self._vocab_size
            )

            def finish(_: Tensor, non_loss_data: bool = False) -> Any:
                if non_loss_data or loss_fn is None:
                    return logprobs, entropy
                loss, metrics = loss_fn(logprobs, entropy, batch)
                metrics = {name: value.detach() for name, value in metrics.items()}
                # With calculate_per_token_loss this triple reaches the backward pass unscaled. The
                # first of it loses its value there; see deallocate_pipeline_outputs in `model.py`.
                no_tokens = torch.zeros((), dtype=torch.int, device=loss.device)
                return loss, no_tokens, (loss.detach(), metrics)

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
        Per micro-batch (logprobs [t], entropy [t]) of its whole row, float32 on the CPU, on every
        rank; 0 where the loss mask is 0.
    """
    scoring = _Pass(models, micro_batches, state, config, vocab_size)
    with torch.no_grad():
        results = scoring.run(None)
    sizes = [batch.labels.numel() for batch in micro_batches]
    # Row by row log-probs and entropies; a rank fills in the tokens that it has.
    flat = torch.zeros(2, sum(sizes), dtype=torch.float32, device=state.device)
    if state.is_last_stage:
        rows = zip(flat.split(sizes, dim=1), scoring.sources, results, strict=False)
        for row, source, pair in rows:
            is_real = source >= 0
            row[:, source[is_real]] = torch.stack(pair)[:, is_real]
        if state.cp_size > 1:
            dist.all_reduce(flat, group=context_group())
    if state.pp_size > 1:
        group = pipeline_group()
        dist.broadcast(flat, src=dist.get_global_rank(group, state.pp_size - 1), group=group)
    return [(row[0], row[1]) for row in flat.cpu().split(sizes, dim=1)]


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

    Afterwards the DDP buffers hold the sum over micro-batches, data- and context-parallel ranks
    (each rank its shard of it, as Megatron's distributed optimizer wants). Buffers must be zero
    before. With `sum_grads` off they hold what this rank's own tokens gave.

    Returns:
        On the last stage, per micro-batch, the metrics of `loss_fn` and its value as `loss`, of
        this rank's tokens; on other stages an empty list.
    """
    results = _Pass(models, micro_batches, state, config, vocab_size).run(
        loss_fn, sum_grads=sum_grads
    )
    return [{"loss": loss.detach(), **metrics} for loss, metrics in results]
