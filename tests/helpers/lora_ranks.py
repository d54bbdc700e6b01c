"""Functions that run on gloo ranks with adapters, and what PEFT says about the same adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.megatron import lora
from megatron_matpo.megatron.actor import MegatronActor
from megatron_matpo.megatron.batch import MicroBatch
from megatron_matpo.megatron.lora_io import adapter_tensors, peft_name
from megatron_matpo.megatron.mapping import local_part
from megatron_matpo.megatron.optimizer_state import members_of
from megatron_matpo.megatron.parallel import ParallelState, data_group
from megatron_matpo.megatron.schedule import forward_backward
from tests.helpers.dist import RankInfo
from tests.helpers.megatron_ranks import complete, layout, make_actor, share
from tests.helpers.tiny import weighted_loss


def fill(actor: MegatronActor, full: Mapping[str, Tensor], state: ParallelState) -> None:
    """Give this rank its part of an adapter under PEFT's names."""
    for adapter in lora.adapters(actor._models):
        adapted = adapter.adapted
        a = torch.cat([full[peft_name(target, "A")] for target in adapted.targets])

        def read(name: str, dim: int | None, start: int, stop: int) -> Tensor:
            zeros = torch.zeros(stop - start, adapter.settings.rank)  # noqa: B023
            return full[peft_name(name, "B")][start:stop] if name in targets else zeros  # noqa: B023

        targets = adapted.targets
        with torch.no_grad():
            if adapter.is_row:
                adapter.A.copy_(a.chunk(state.tp_size, dim=1)[state.tp_rank])
                adapter.B.copy_(full[peft_name(targets[0], "B")])
            else:
                adapter.A.copy_(a)
                hf = actor._hf
                adapter.B.copy_(local_part(adapted.rule, read, hf, state.tp_rank, state.tp_size))
    actor._optimizer.reload_model_params()


def exported(actor: MegatronActor, state: ParallelState) -> dict[str, Tensor]:
    """The adapter by PEFT's names, on rank 0."""
    return adapter_tensors(actor._models, actor._hf, actor._config.lora, state)


def grads(
    actor: MegatronActor, config: Config, batches: Sequence[MicroBatch], state: ParallelState
) -> dict[str, Tensor]:
    """Full gradients of all As and Bs by PEFT's names: the export with gradients for values."""
    hf = HfModelConfig.from_folder(config.model.path)
    for model in actor._models:
        model.train()
        model.zero_grad_buffer()
    forward_backward(actor._models, batches, weighted_loss, state, config, vocab_size=hf.vocab_size)
    for model in actor._models:
        for buffer in model.buffers:
            complete(buffer, data_group())
    trained = [p for model in actor._models for p in model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in trained]
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(parameter.main_grad)
        result = exported(actor, state)
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    return result


def lora_story(
    info: RankInfo,
    config: Config,
    batches: Sequence[MicroBatch],
    full: Mapping[str, Tensor],
    folder: Path,
) -> dict[str, Any]:
    """With the adapter `full`: score, differentiate, update three times, export, save."""
    with layout(info, config) as state:
        actor = make_actor(config, state)
        mine = share(batches, state)
        story: dict[str, Any] = {"dp_rank": state.dp_rank, "initial": exported(actor, state)}
        actor.load_reference()
        story["before"] = actor.score(mine)
        base = _base(actor)
        fill(actor, full, state)
        story["filled"] = exported(actor, state)
        story["scores"] = actor.score(mine)
        story["reference"] = actor.score_reference(mine)
        story["merged"] = dict(actor.export())
        story["grads"] = grads(actor, config, mine, state)
        if config.parallel.data == 1:
            story["recomputed"] = _recomputed(actor, config, mine, state)
        story["updates"] = [actor.update(mine, weighted_loss, i) for i in range(3)]
        story["final"] = exported(actor, state)
        story["base kept"] = all(
            torch.equal(a.view(torch.int32), b.view(torch.int32))
            for a, b in zip(base, _base(actor), strict=True)
        )
        story["sizes"] = sizes(actor)
        actor.save_adapter(folder / "adapter")
        actor.save_hf(folder / "hf")
        story["last scores"] = actor.score(mine)
        return story


def _recomputed(
    actor: MegatronActor, config: Config, batches: Sequence[MicroBatch], state: ParallelState
) -> dict[str, Tensor]:
    """`grads` with Megatron's full recompute, which drops layers whose input wants no gradient."""
    decoder = actor._models[0].module.config
    decoder.recompute_granularity, decoder.recompute_method = "full", "uniform"
    decoder.recompute_num_layers = 1
    result = grads(actor, config, batches, state)
    decoder.recompute_granularity = decoder.recompute_method = decoder.recompute_num_layers = None
    return result


def _base(actor: MegatronActor) -> list[Tensor]:
    """Copies of this rank's base parameters."""
    return [
        p.detach().clone()
        for model in actor._models
        for name, p in model.named_parameters()
        if not lora.is_adapter(name)
    ]


def sizes(actor: MegatronActor) -> dict[str, int]:
    """Bytes of this rank's gradient buffers and optimizer state; numbers of parameters."""
    parameters = [p for model in actor._models for p in model.parameters()]
    return {
        "gradients": sum(b.grad_data.nbytes for model in actor._models for b in model.buffers),
        "optimizer": sum(
            tensor.nbytes
            for member in members_of(actor._optimizer)
            for moments in member.optimizer.state.values()
            for name, tensor in moments.items()
            if name != "step"
        ),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "all": sum(p.numel() for p in parameters),
    }


def learning_curve(
    info: RankInfo, config: Config, batches: Sequence[MicroBatch], num_updates: int
) -> list[float]:
    """Mean negative log-likelihood of all real tokens before each update."""
    with layout(info, config) as state:
        actor = make_actor(config, state)
        batches = [replace(b, loss_mask=(b.input_ids != 0).float()) for b in batches]
        count = float(sum(batch.loss_mask.sum() for batch in batches))

        def loss_fn(logprobs: Tensor, entropy: Tensor, batch: MicroBatch) -> Any:
            return -(logprobs * batch.loss_mask).sum() / count, {}

        mine = share(batches, state)
        return [actor.update(mine, loss_fn, i).loss for i in range(num_updates)]
