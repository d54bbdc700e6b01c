"""What the formulas need: the model's sizes, the layout, and the settings that change memory.

Letters in the formulas of this package: h hidden size, f feed-forward size, q = heads x head size,
k = key/value heads x head size, V padded vocabulary, L layers, t tensor-parallel size, T tokens of
a micro-batch on one rank; E experts, each of feed-forward size m, a of which see a token; r rank
of adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.config.precision import Precision, decide_precision, named_platform


@dataclass(frozen=True)
class Layout:
    """How the trainer is split, and what it trades time for."""

    tensor: int
    pipeline: int
    context: int
    data: int
    virtual: int = 1
    expert: int = 1
    sequence: bool = False
    recompute: str = "none"
    offload: bool = False

    @property
    def world_size(self) -> int:
        """Trainer ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def optimizer_ranks(self) -> int:
        """Ranks that share the optimizer of one stage: data and context parallel together."""
        return self.data * self.context

    @property
    def expert_replicas(self) -> int:
        """Ranks of a stage that hold the same experts, and share their optimizer."""
        return self.tensor * self.context * self.data // self.expert

    @property
    def sequence_split(self) -> int:
        """Ranks over which sequence parallelism splits norms and residuals."""
        return self.tensor if self.sequence else 1


@dataclass(frozen=True)
class Job:
    """A trainer whose memory is asked for."""

    hf: HfModelConfig
    layout: Layout
    parameters: str
    """`fp32` or `bf16`."""
    fp8_recipe: str
    fp8_params: bool
    fp8_bf16_layers: int
    """First and last layers that stay in bf16, both ends together."""
    micro_batch_tokens: int
    """Of the largest packed micro-batch, over all context-parallel ranks."""
    logprob_chunk_tokens: int
    bucket_mb: int
    has_reference: bool
    is_local: bool
    """Megatron's own layers on a CPU, instead of Transformer Engine's on a GPU."""
    lora_rank: int = 0
    """Of adapters beside frozen weights; 0: every weight is trained."""
    lora_layers: tuple[str, ...] = ()
    """Hugging Face names of the linear layers with adapters."""

    @property
    def element_bytes(self) -> int:
        """Size of a parameter, and of an activation."""
        return 4 if self.parameters == "fp32" else 2

    @property
    def tokens(self) -> int:
        """T: of the largest micro-batch on one rank."""
        return -(-self.micro_batch_tokens // self.layout.context)

    def layers_of(self, stage: int, chunk: int) -> range:
        """Indices of a chunk's layers; stages take turns chunk by chunk (Megatron's schedule)."""
        count = self.hf.num_layers // (self.layout.pipeline * self.layout.virtual)
        first = (chunk * self.layout.pipeline + stage) * count
        return range(first, first + count)

    @property
    def padded_vocab(self) -> int:
        """V."""
        t = self.layout.tensor
        return -(-self.hf.vocab_size // t) * t


def layout_of(config: Config) -> Layout:
    """The recipe's layout."""
    parallel = config.parallel
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        data=parallel.data,
        virtual=parallel.virtual,
        expert=parallel.expert,
        sequence=parallel.sequence and parallel.tensor > 1,
        recompute=config.train.recompute,
        offload=config.optim.offload,
    )


def job_of(config: Config, hf: HfModelConfig, precision: Precision | None = None) -> Job:
    """The recipe's trainer.

    A trajectory longer than the token budget gets a micro-batch of its own, so the largest
    micro-batch has the larger of the two. `precision`: what a device decided; without, what
    `cluster.gpu` lets expect.
    """
    precision = precision or precision_of(config)
    return Job(
        hf=hf,
        layout=layout_of(config),
        parameters=precision.parameters,
        fp8_recipe=precision.fp8_recipe,
        fp8_params=config.fp8.params,
        fp8_bf16_layers=min(hf.num_layers, 2 * config.fp8.first_last_layers_bf16),
        micro_batch_tokens=max(config.train.micro_batch_tokens, config.rollout.context_length),
        logprob_chunk_tokens=config.train.logprob_chunk_tokens,
        bucket_mb=config.weight_sync.bucket_mb,
        # With adapters the reference is the model without them.
        has_reference=config.algo.kl_coef > 0 and not config.lora.rank,
        is_local=config.cluster.device == "cpu",
        lora_rank=config.lora.rank,
        lora_layers=config.lora.layers,
    )


def precision_of(config: Config) -> Precision:
    """What the recipe trains in, on the GPU that it names."""
    return decide_precision(config, named_platform(config))
