"""Random Qwen3 models of a few thousand parameters, and batches and configurations for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_matpo.config import Config
from megatron_matpo.config.train import ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from megatron_matpo.megatron.batch import MicroBatch

VOCAB_SIZE = 101
"""Odd, so that tensor parallelism has to pad."""


def make_tiny_model(folder: Path, *, tied: bool, seed: int = 0, **sizes: int) -> Path:
    """Write a 4-layer Qwen3 with transformers; norms are random too, so that mix-ups show.

    `sizes` are fields of its configuration that shall differ from those below.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    model = Qwen3ForCausalLM(
        Qwen3Config(
            **{**shape, **sizes},
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            initializer_range=0.1,
            eos_token_id=3,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def tiny_config(
    folder: Path | str, *, tp: int = 1, pp: int = 1, cp: int = 1, dp: int = 1, **train: Any
) -> Config:
    """fp32 on the CPU; Adam's epsilon is large so that rounding is not amplified by 1 / |g|."""
    return Config(
        model=ModelConfig(path=str(folder)),
        parallel=ParallelConfig(tensor=tp, pipeline=pp, context=cp, data=dp),
        optim=OptimConfig(lr=1e-3, eps=1e-3, clip_grad=0.5, warmup_steps=2),
        train=TrainConfig(**{"timeout_s": 60.0, **train}),
    )


def make_batch(shape: tuple[int, int], seed: int) -> MicroBatch:
    """Packed random samples: so many, of at most so many tokens; about half are trained."""
    samples, longest = shape
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (samples,), generator=generator).tolist()
    t = sum(lengths)
    ids, labels = torch.randint(0, VOCAB_SIZE, (2, t), generator=generator)
    mask = (torch.rand(t, generator=generator) < 0.5).float()
    zeros = torch.zeros(t)
    return MicroBatch(
        input_ids=ids,
        labels=labels,
        loss_mask=mask,
        old_logprobs=zeros,
        rollout_logprobs=zeros,
        advantages=torch.randn(t, generator=generator),
        loss_weights=mask,
        is_worker=zeros,
        lengths=tuple(lengths),
        sample_ids=tuple(f"{seed}/{i}" for i in range(samples)),
    )


def unpacked(batch: MicroBatch) -> list[MicroBatch]:
    """The samples of a micro-batch, each alone."""
    parts = {name: value.split(batch.lengths) for name, value in batch.tensors().items()}
    return [
        MicroBatch(
            **{name: values[i] for name, values in parts.items()},
            lengths=(length,),
            sample_ids=batch.sample_ids[i : i + 1],
        )
        for i, length in enumerate(batch.lengths)
    ]


def packed(samples: Sequence[MicroBatch]) -> MicroBatch:
    """The opposite: one micro-batch of all their samples."""
    rows = [sample.tensors() for sample in samples]
    return MicroBatch(
        **{name: torch.cat([row[name] for row in rows]) for name in rows[0]},
        lengths=tuple(length for sample in samples for length in sample.lengths),
        sample_ids=tuple(name for sample in samples for name in sample.sample_ids),
    )


def weighted_loss(
    logprobs: Tensor, entropy: Tensor, batch: MicroBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss with a different weight for every token, already divided by a fixed denominator."""
    loss = -(logprobs * batch.advantages * batch.loss_mask).sum() / 50
    metrics = {
        "tokens": batch.loss_mask.sum(),
        "entropy": (entropy * batch.loss_mask).sum(),
        "largest/max": (batch.labels * batch.loss_mask).max(),
    }
    return loss, metrics


def reference_logprobs(folder: Any, batches: Sequence[MicroBatch]) -> list[tuple[Tensor, Tensor]]:
    """What transformers says, unpacked: (logprobs, entropies) [t], 0 where the loss mask is 0."""
    model = _reference(folder)
    results = []
    with torch.no_grad():
        for batch in batches:
            rows = [model(input_ids=one.input_ids[None]).logits[0] for one in unpacked(batch)]
            table = torch.cat(rows).double().log_softmax(-1)
            chosen = table.gather(-1, batch.labels[:, None]).squeeze(-1)
            entropy = -(table.exp() * table).sum(-1)
            results.append((chosen * batch.loss_mask, entropy * batch.loss_mask))
    return results


def reference_grads(folder: Any, batches: Sequence[MicroBatch]) -> tuple[float, dict[str, Tensor]]:
    """Summed `weighted_loss` and its gradients by Hugging Face name: transformers, unpacked."""
    model = _reference(folder)
    total = 0.0
    for one in (sample for batch in batches for sample in unpacked(batch)):
        table = model(input_ids=one.input_ids[None]).logits[0].log_softmax(-1)
        chosen = table.gather(-1, one.labels[:, None]).squeeze(-1)
        loss, _ = weighted_loss(chosen, torch.zeros_like(chosen), one)
        loss.backward()
        total += float(loss)
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _reference(folder: Any) -> Any:
    """The model of a folder; a model stays what it is."""
    from transformers import AutoModelForCausalLM

    if not isinstance(folder, Path):
        return folder
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
