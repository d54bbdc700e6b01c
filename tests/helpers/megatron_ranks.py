"""Functions that run on gloo ranks: each joins a layout, does one thing, and leaves."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from safetensors.torch import load_file

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.errors import ConfigError
from megatron_matpo.megatron.actor import MegatronActor, UpdateResult
from megatron_matpo.megatron.batch import MicroBatch, empty_micro_batch
from megatron_matpo.megatron.logprobs import vocab_parallel_logprobs
from megatron_matpo.megatron.nonfinite import UpdateRefused
from megatron_matpo.megatron.parallel import (
    ParallelState,
    data_group,
    destroy_parallel,
    expert_data_group,
    init_parallel,
    tensor_group,
)
from megatron_matpo.megatron.schedule import LossFn, forward_backward
from tests.helpers.dist import RankInfo
from tests.helpers.tiny import unpacked, weighted_loss


@contextlib.contextmanager
def layout(info: RankInfo, config: Config) -> Iterator[ParallelState]:
    """Join the layout of `config.parallel`, and leave it again."""
    state = init_parallel(
        config,
        rank=info.rank,
        world_size=info.world_size,
        master_addr="127.0.0.1",
        master_port=info.port,
    )
    try:
        yield state
    finally:
        destroy_parallel()
        _forget_probabilities()


def _forget_probabilities() -> None:
    """Let models with experts be freed, and with them the process groups that they hold.

    Their dispatchers keep the last probabilities, whose history leads to the router's weight, and
    by its hook to the model: a cycle through the autograd graph, which Python's collector cannot
    see. A run has one model until its end.
    """
    for item in gc.get_objects():
        if isinstance(item, MoETokenDispatcher):
            vars(item).pop("probs", None)


def make_actor(config: Config, state: ParallelState) -> MegatronActor:
    """An actor with the weights of `model.path`."""
    actor = MegatronActor(config, HfModelConfig.from_folder(config.model.path), state)
    actor.load_initial()
    return actor


def share(batches: Sequence[MicroBatch], state: ParallelState) -> list[MicroBatch]:
    """This replica's batches, evened out with empty ones."""
    mine = list(batches[state.dp_rank :: state.dp_size])
    most = -(-len(batches) // state.dp_size)
    return mine + [empty_micro_batch()] * (most - len(mine))


def whole_story(
    info: RankInfo, config: Config, batches: Sequence[MicroBatch], folder: Path
) -> dict[str, Any]:
    """Load, score, differentiate, update three times, export and save in one layout.

    Every rank returns its scores and update results; rank 0 also what it exported.
    """
    with layout(info, config) as state:
        actor = make_actor(config, state)
        mine = share(batches, state)
        story: dict[str, Any] = {"dp_rank": state.dp_rank, "initial": dict(actor.export())}
        story["scores"] = actor.score(mine)
        story["grads"] = grads(actor, config, mine, state)
        story["updates"] = [actor.update(mine, weighted_loss, i) for i in range(3)]
        story["final"] = dict(actor.export())
        actor.save_hf(folder)
        if state.is_logging_rank:
            story["saved"] = load_file(folder / "model.safetensors")
        return story


def grads(
    actor: MegatronActor,
    config: Config,
    batches: Sequence[MicroBatch],
    state: ParallelState,
    loss_fn: LossFn = weighted_loss,
) -> dict[str, torch.Tensor]:
    """Full gradients by Hugging Face name on rank 0: what export gives with grads for weights."""
    hf = HfModelConfig.from_folder(config.model.path)
    for model in actor._models:
        model.zero_grad_buffer()
    forward_backward(actor._models, batches, loss_fn, state, config, vocab_size=hf.vocab_size)
    for model in actor._models:
        for buffer in model.buffers:
            complete(buffer, data_group())
        for buffer in model.expert_parallel_buffers:
            complete(buffer, expert_data_group())
    parameters = [p for model in actor._models for p in model.parameters()]
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.main_grad)
        exported = dict(actor.export())
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return exported


def complete(buffer: Any, group: dist.ProcessGroup) -> None:
    """Each data-parallel rank has reduced its shard only; tied embeddings are a bucket apart."""
    for bucket in buffer.buckets:
        shards = [shard.clone() for shard in bucket.grad_data.chunk(group.size())]
        dist.all_gather(shards, shards[group.rank()].clone(), group=group)
        bucket.grad_data.copy_(torch.cat(shards))


def short_story(info: RankInfo, config: Config, batches: Sequence[MicroBatch]) -> dict[str, Any]:
    """Load, export, score (packed, and each sample alone), differentiate, update twice."""
    with layout(info, config) as state:
        actor = make_actor(config, state)
        mine = share(batches, state)
        story: dict[str, Any] = {"dp_rank": state.dp_rank, "initial": dict(actor.export())}
        story["scores"] = actor.score(mine)
        samples = [sample for batch in batches for sample in unpacked(batch)]
        story["alone"] = actor.score(share(samples, state))
        story["grads"] = grads(actor, config, mine, state)
        story["updates"] = [actor.update(mine, weighted_loss, i) for i in range(2)]
        story["final"] = dict(actor.export())
        return story


def scores_and_update(
    info: RankInfo, config: Config, batches: Sequence[MicroBatch]
) -> tuple[Any, UpdateResult]:
    """Log-probs and entropies of the initial model, then one update."""
    with layout(info, config) as state:
        actor = make_actor(config, state)
        mine = share(batches, state)
        return actor.score(mine), actor.update(mine, weighted_loss, 0)


def loss_and_grads(
    info: RankInfo, config: Config, batches: Sequence[MicroBatch]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of an update in one layout, and `grads`."""
    with layout(info, config) as state:
        actor, mine = make_actor(config, state), share(batches, state)
        full = grads(actor, config, mine, state)
        return actor.update(mine, weighted_loss, 0).loss, full


def non_finite_updates(
    info: RankInfo, config: Config, batches: Sequence[MicroBatch]
) -> dict[str, Any]:
    """Updates whose loss or gradient is not finite, then a good one; errors and weights.

    The last bad one overflows where gradients of weights are summed, and in a micro-batch that
    holds the sample `6/0` only.
    """

    def bad_loss(logprobs: torch.Tensor, entropy: torch.Tensor, batch: MicroBatch) -> Any:
        loss, metrics = weighted_loss(logprobs, entropy, batch)
        return loss * float("nan"), metrics

    def bad_grad(logprobs: torch.Tensor, entropy: torch.Tensor, batch: MicroBatch) -> Any:
        # Finite forward, infinite derivative.
        return (logprobs.sum() * 0).sqrt(), {"tokens": batch.loss_mask.sum()}

    def overflow(logprobs: torch.Tensor, entropy: torch.Tensor, batch: MicroBatch) -> Any:
        factor = 3e38 if "6/0" in batch.sample_ids else 1.0
        return ((logprobs - logprobs.detach()) * factor).sum(), {"tokens": batch.loss_mask.sum()}

    with layout(info, config) as state:
        actor = make_actor(config, state)
        mine = share(batches, state)
        story: dict[str, Any] = {"refused": []}
        for loss_fn in (bad_loss, bad_grad, overflow):
            try:
                actor.update(mine, loss_fn, 0)
            except UpdateRefused as refused:
                story["refused"].append((str(refused), refused.culprits))
        story["kept"] = dict(actor.export())
        story["good"] = actor.update(mine, weighted_loss, 0)
        return story


def sharded_logprobs(
    info: RankInfo,
    config: Config,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
) -> list[dict[str, torch.Tensor]]:
    """`vocab_parallel_logprobs` of this rank's rows for several chunk sizes, with gradients."""
    results = []
    with layout(info, config) as state:
        for chunk_tokens in (1, 3, 1000):
            rows = weight.chunk(state.tp_size)[state.tp_rank].clone().requires_grad_()
            states = hidden.clone().requires_grad_()
            logprobs, entropy = vocab_parallel_logprobs(
                states,
                rows,
                labels,
                vocab_size=vocab_size,
                temperature=0.7,
                tp_group=tensor_group(),
                chunk_tokens=chunk_tokens,
            )
            (logprobs * torch.arange(1.0, labels.numel() + 1)).sum().backward()
            results.append(
                {
                    "logprobs": logprobs.detach(),
                    "entropy": entropy,
                    "grad_hidden": states.grad,
                    "grad_weight": rows.grad,
                }
            )
    return results


def num_threads(_: RankInfo) -> int:
    """Of this process, which is in no layout at the moment."""
    return len(list(Path("/proc/self/task").iterdir()))


def layout_error(info: RankInfo, config: Config) -> str:
    """The ConfigError of joining the layout or building the model."""
    try:
        with layout(info, config) as state:
            make_actor(config, state)
    except ConfigError as error:
        return str(error)
    return ""


def random_init(info: RankInfo, config: Config) -> dict[str, torch.Tensor]:
    """Seeded random weights, exported."""
    with layout(info, config) as state:
        return dict(make_actor(config, state).export())
