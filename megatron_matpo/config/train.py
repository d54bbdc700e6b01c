"""Sections `model`, `parallel`, `optim`, `train`, `weight_sync` and `sft`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """The policy."""

    path: str = ""
    """Hugging Face folder: config.json, *.safetensors, tokenizer.json, chat template."""
    random_init: bool = False
    """Start from random weights (seeded by `run.seed`) instead of the folder's; only for `sft`."""


@dataclass(frozen=True)
class ParallelConfig:
    """The trainer's layout; the number of trainer ranks is the product."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    data: int = 1
    virtual: int = 1
    """Model chunks per pipeline stage (interleaved schedule)."""
    sequence: bool = False
    """Split norms and residuals over the tensor-parallel ranks along the tokens."""

    @property
    def world_size(self) -> int:
        """Number of trainer ranks (expert parallelism lies inside the others)."""
        return self.tensor * self.pipeline * self.context * self.data


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Megatron's distributed optimizer) and its schedule."""

    lr: float = 1e-5
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly to `lr`; constant afterwards."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    offload: bool = False
    """Keep fp32 parameters and moments on the host."""


@dataclass(frozen=True)
class TrainConfig:
    """How the trainer runs a batch."""

    micro_batch_tokens: int = 8192
    """Upper bound of padded tokens in one micro-batch (one trajectory always fits alone)."""
    timeout_s: float = 600.0
    """Deadline of every collective and of the process group's formation."""
    logprob_chunk_tokens: int = 2048
    """Tokens whose float32 logits exist at a time in the log-prob computation."""
    recompute: str = "none"
    """`none | selective | full`: activations that the backward pass computes again."""


@dataclass(frozen=True)
class WeightSyncConfig:
    """How the engines get the weights after every step."""

    transport: str = "broadcast"
    """`broadcast`, or `none`: the control experiment in which engines keep the first weights."""
    bucket_mb: int = 256
    timeout_s: float = 120.0
    """Deadline of forming the group, and of each bucket."""


@dataclass(frozen=True)
class SftConfig:
    """Supervised training with the same actor (`matpo sft`)."""

    data: str = ""
    """JSONL of conversations: {"id", "role", "messages": [{"role", "content"}, ...]}."""
    steps: int = 1000
    batch_size: int = 32
    """Conversations per optimizer update, over all data-parallel ranks."""
    export: str = ""
    """Folder for the trained policy in Hugging Face format; empty: `RUN/checkpoints/hf`."""
