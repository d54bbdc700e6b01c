"""The policy as a Megatron-Core GPTModel: this rank's part of it.

Invariants:

* no dropout anywhere, so a forward pass is a function of the weights and the tokens;
* gradients are plain sums over micro-batches and data-parallel ranks: `calculate_per_token_loss`
  switches off every averaging of Megatron's (`schedules.py:forward_step_calc_loss`,
  `distributed_data_parallel.py:254`), and `schedule.py` switches off the division by the number of
  tokens that it would bring instead;
* the vocabulary is padded to a multiple of the tensor-parallel size; the padded rows exist only in
  memory and never get probability (`logprobs.py`).

Letters in shapes: b sequences, s tokens, h hidden size, n selected tokens, V padded vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig, check_layout
from megatron_matpo.errors import ConfigError
from megatron_matpo.megatron.lora import add_adapters, describe_shards
from megatron_matpo.megatron.parallel import ParallelState, resolve_precision


class CausalAttention(nn.Module):
    """Core attention of the local layer spec: torch's own kernel, causal at any length.

    Megatron's `DotProductAttention` wants a mask tensor per shape and makes [b, heads, s, s]
    several times; the CPU kernel behind `scaled_dot_product_attention` does neither.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any):
        """Take what Megatron's `Attention` passes to its core; most of it is unused."""
        super().__init__()
        self._scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """[s, b, heads/tp, d] and [s, b, kv_heads/tp, d] twice -> [s, b, heads/tp * d]."""
        assert attention_bias is None and packed_seq_params is None, "rectangular batches only"
        output = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=True,
            scale=self._scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return output.permute(2, 0, 1, 3).flatten(2)


class PolicyModel(GPTModel):
    """GPTModel whose forward ends at the hidden states, on the last stage too.

    Log-probs are needed for sampled tokens only, which are a minority of a trajectory with tool
    replies; so the output layer is applied to chosen rows by `logits`, not to everything.
    """

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[s, b, h]; after the final norm on the last stage."""
        return hidden_states

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron's description for checkpoints, which knows nothing of adapters."""
        return describe_shards(self, super().sharded_state_dict(*args, **kwargs))

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, h] -> [n, V/tp]. Last stage only; its tensor-parallel ranks call together."""
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        output, _ = self.output_layer(hidden.unsqueeze(1), weight=weight)
        return output.squeeze(1)


def padded_vocab_size(hf: HfModelConfig, tp_size: int) -> int:
    """The vocabulary's size rounded up to a multiple of the tensor-parallel size."""
    return -(-hf.vocab_size // tp_size) * tp_size


def _leave_as_is(weight: Tensor) -> Tensor:
    """Initialisation that does nothing."""
    return weight


def transformer_config(
    config: Config, hf: HfModelConfig, state: ParallelState
) -> TransformerConfig:
    """The one place where our configuration becomes Megatron's."""
    dtype = resolve_precision(config)
    on_cpu = state.device.type == "cpu"
    return TransformerConfig(
        num_layers=hf.num_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_heads,
        num_query_groups=hf.num_kv_heads,
        kv_channels=hf.head_dim,
        ffn_hidden_size=hf.ffn_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_eps,
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=state.tp_size,
        pipeline_model_parallel_size=state.pp_size,
        context_parallel_size=state.cp_size,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        # Weights come from `hf_io` in every case. Not `perform_initialization=False`: that also
        # leaves out the marks by which the gradient norm counts every split parameter.
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        use_cpu_initialization=False,
        calculate_per_token_loss=True,
        # Micro-batches differ in length. Megatron refuses that under pipeline parallelism unless
        # the dispatcher of a mixture of experts is `alltoall`, also for a dense model.
        variable_seq_lengths=state.pp_size > 1,
        moe_token_dispatcher_type="alltoall",
        # The fused kernels need Apex or a compiler; on a CPU they only cost start-up time.
        bias_activation_fusion=not on_cpu,
        bias_dropout_fusion=not on_cpu,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        cuda_graph_impl="none",
    )


def _layer_spec(state: ParallelState) -> ModuleSpec:
    """Local modules on CPU, Transformer Engine's on GPU.

    Raises:
        ConfigError: on a GPU without Transformer Engine.
    """
    if state.device.type == "cpu":
        spec: Any = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
        spec.submodules.self_attention.submodules.core_attention = CausalAttention
        return spec
    try:
        import transformer_engine.pytorch  # noqa: F401  (only whether it is there)
    except ImportError as error:
        raise ConfigError(
            "cluster.gpus_per_node > 0 needs Transformer Engine in the trainer's environment "
            f"(import failed: {error}); use the project's image, or cluster.gpus_per_node=0"
        ) from error
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)


def build_model(config: Config, hf: HfModelConfig, state: ParallelState) -> list[PolicyModel]:
    """This rank's stage of the model, with uninitialised weights; a list of one chunk.

    Every trainer rank calls; stages with tied embeddings communicate.

    Raises:
        ConfigError: the layout does not divide the model, or the platform lacks a part.
    """
    problems = check_layout(hf, config.parallel)
    if problems:
        raise ConfigError("\n".join(problems))
    model = PolicyModel(
        transformer_config(config, hf, state),
        _layer_spec(state),
        vocab_size=padded_vocab_size(hf, state.tp_size),
        max_sequence_length=hf.max_positions,
        pre_process=state.is_first_stage,
        post_process=state.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=hf.rope_theta,  # type: ignore[arg-type]  (Megatron divides by a power of it)
    )
    # The local spec's norms ignore params_dtype.
    model = model.to(device=state.device, dtype=resolve_precision(config))
    add_adapters([model], hf, config.lora, state)
    return [model]


def wrap_ddp(config: Config, models: list[PolicyModel]) -> list[DistributedDataParallel]:
    """Wrap each chunk for data parallelism: flat fp32 gradient buffers, summed over the ranks."""
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        average_in_collective=False,
    )
    return [DistributedDataParallel(model.config, ddp_config, model) for model in models]


def unwrap(model: Any) -> PolicyModel:
    """The PolicyModel inside `model`."""
    while not isinstance(model, PolicyModel):
        model = model.module
    return model
