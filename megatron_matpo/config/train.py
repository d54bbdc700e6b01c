"""Sections `model`, `parallel`, `optim`, `train`, `weight_sync` and `sft`."""

from __future__ import annotations

from dataclasses import dataclass, replace


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
    virtual: int = 1
    """Chunks of layers per pipeline stage (Megatron's interleaved schedule). Above 1, all micro-
    batches of an update are padded to one shape."""
    context: int = 1
    expert: int = 1
    """Ranks that share the experts of a layer; lies inside tensor x context x data."""
    data: int = 1
    sequence: bool = False
    """Between the split layers every tensor-parallel rank holds a part of the sequence only; saves
    activations, no effect with `tensor` 1. Required for experts with `tensor` above 1."""

    @property
    def world_size(self) -> int:
        """Number of trainer ranks (expert parallelism lies inside the others)."""
        return self.pipeline * self.stage_size

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage, over all replicas."""
        return self.tensor * self.context * self.data

    @property
    def splits_sequence(self) -> bool:
        """Whether `sequence` has an effect."""
        return self.sequence and self.tensor > 1


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Megatron's distributed optimizer) and its schedule."""

    lr: float = 1e-5
    schedule: str = "constant"
    """`constant | linear | cosine`: the way from `lr` to `min_lr` after warm-up."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly to `lr`."""
    decay_steps: int = 0
    """Updates, warm-up included, after which it stays at `min_lr`. 0: all that the run can make
    (`run.steps * algo.updates_per_step`; `run.steps` with `compat: reference`; `sft.steps`). A step
    with fewer episodes than updates makes fewer, and then the schedule ends above `min_lr`."""
    min_lr: float = 0.0
    """Of `linear` and `cosine`."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    offload: bool = False
    """Keep fp32 parameters and moments in pinned host memory and update there; bf16 on GPU only."""

    def planned(self, num_updates: int) -> OptimConfig:
        """With `decay_steps` of a run that makes at most `num_updates`, where it is left open."""
        return self if self.decay_steps else replace(self, decay_steps=num_updates)


@dataclass(frozen=True)
class TrainConfig:
    """How the trainer runs a batch."""

    micro_batch_tokens: int = 8192
    """Most tokens that are packed into one micro-batch; a longer trajectory is alone in one."""
    timeout_s: float = 600.0
    """Deadline of every collective and of the process group's formation."""
    logprob_chunk_tokens: int = 2048
    """Tokens whose float32 logits exist at a time in the log-prob computation."""
    recompute: str = "none"
    """`none | selective | full`: activations made again in the backward pass instead of kept.
    `selective`: those of the feed-forward part; `full`: all but the inputs of layers."""
    on_non_finite: str = "stop"
    """`stop | skip` an update whose loss or gradient is not finite; both write its batch to
    `RUN/nonfinite/` and name its trajectories."""
    max_skipped_updates: int = 3
    """With `skip`: so many in a row are left out, the next one stops the run."""
    peak_tflops: float = 0.0
    """Peak of one device for `train/mfu`, in 10^12 FLOP/s; 0: by the device's name, if known."""


@dataclass(frozen=True)
class WeightSyncConfig:
    """How the engines get the weights after every step."""

    transport: str = "auto"
    """`auto`: `ipc` with `cluster.placement=colocated`, else `broadcast`. `ipc`: in memory that
    trainer and engines of one machine (GPU: of the same devices) share; `disk`: for engines that
    share only a file system with the trainer; `none`: the control experiment in which engines keep
    the first weights."""
    verify: str = "sample"
    """`full | sample | version`: what is compared before engines serve new weights. `full`: the
    engine's checksums of all parameters with the trainer's; `sample`: of an eighth of them, another
    one every push (all at the first); `version`: only the number that the engine reports.
    Parameters of experts are compared between engines."""
    folder: str = ""
    """Of `disk`: where the weights are written, as all nodes see it; empty: `RUN/weights`."""
    bucket_mb: int = 128
    """Of `broadcast` and `ipc`: bytes that travel together; two buckets exist at a time on trainer
    rank 0 (`ipc` on GPUs: on every rank)."""
    timeout_s: float = 120.0
    """Deadline of every wait of a push: the group's forming, a pause, each bucket (with `disk`: the
    loading), the comparison, and the resumption. Colocated: also until memory is free."""
    retries: int = 1
    """How often a push that failed is tried again, with the engines that still answer. Not with
    colocated engines, nor where several pipeline stages send."""
    answer_timeout_s: float = 10.0
    """After a failed push an engine that does not answer inside this is started anew."""


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
