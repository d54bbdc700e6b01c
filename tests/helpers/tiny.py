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


def make_tiny_model(folder: Path, *, tied: bool, seed: int = 0) -> Path:
    """Write a 4-layer Qwen3 with transformers; norms are random too, so that mix-ups show."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
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
    folder: Path | str, *, tp: int = 1, pp: int = 1, dp: int = 1, **train: Any
) -> Config:
    """fp32 on the CPU; Adam's epsilon is large so that rounding is not amplified by 1 / |g|."""
    return Config(
        model=ModelConfig(path=str(folder)),
        parallel=ParallelConfig(tensor=tp, pipeline=pp, data=dp),
        optim=OptimConfig(lr=1e-3, eps=1e-3, clip_grad=0.5, warmup_steps=2),
        train=TrainConfig(**{"timeout_s": 60.0, **train}),
    )


def make_batch(shape: tuple[int, int], seed: int) -> MicroBatch:
    """Random tokens, right-padded; about half of the real tokens are trained."""
    rows, width = shape
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB_SIZE, (rows, width + 1), generator=generator)
    lengths = torch.randint(2, width + 1, (rows, 1), generator=generator)
    real = torch.arange(width) < lengths
    mask = (torch.rand(rows, width, generator=generator) < 0.5) & real
    zeros = torch.zeros(rows, width)
    return MicroBatch(
        input_ids=tokens[:, :-1] * real,
        labels=tokens[:, 1:] * real,
        position_ids=torch.arange(width).expand(rows, width),
        loss_mask=mask.float(),
        old_logprobs=zeros,
        rollout_logprobs=zeros,
        advantages=torch.randn(rows, width, generator=generator),
        loss_weights=mask.float(),
        is_worker=torch.zeros(rows, 1),
        sample_ids=tuple(f"{seed}/{row}" for row in range(rows)),
    )


def weighted_loss(
    logprobs: Tensor, entropy: Tensor, batch: MicroBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss with a different weight for every token, already divided by a fixed denominator."""
    loss = -(logprobs * batch.advantages * batch.loss_mask).sum() / 50
    metrics = {
        "tokens": batch.loss_mask.sum(),
        "entropy": (entropy * batch.loss_mask).sum(),
        "widest/max": torch.tensor(float(batch.labels.shape[1])),
    }
    return loss, metrics


def reference_logprobs(folder: Any, batches: Sequence[MicroBatch]) -> list[tuple[Tensor, Tensor]]:
    """What transformers says: (logprobs, entropies) [b, s], 0 where the loss mask is 0."""
    model = _reference(folder)
    results = []
    with torch.no_grad():
        for batch in batches:
            logits = model(input_ids=batch.input_ids).logits.double()
            table = logits.log_softmax(-1)
            chosen = table.gather(-1, batch.labels[..., None]).squeeze(-1)
            entropy = -(table.exp() * table).sum(-1)
            results.append((chosen * batch.loss_mask, entropy * batch.loss_mask))
    return results


def reference_grads(folder: Any, batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
    """Gradients of the summed `weighted_loss` by Hugging Face name, from transformers."""
    model = _reference(folder)
    for batch in batches:
        table = model(input_ids=batch.input_ids).logits.log_softmax(-1)
        chosen = table.gather(-1, batch.labels[..., None]).squeeze(-1)
        weighted_loss(chosen, torch.zeros_like(chosen), batch)[0].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _reference(folder: Any) -> Any:
    """The model of a folder; a model stays what it is."""
    from transformers import AutoModelForCausalLM

    if not isinstance(folder, Path):
        return folder
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
