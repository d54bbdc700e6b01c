"""The policy as a Megatron-Core GPTModel: this rank's part of it.

Invariants:

* no dropout anywhere, so a forward pass is a function of the weights and the tokens;
* gradients are plain sums over micro-batches and data-parallel ranks: `calculate_per_token_loss`
  switches off every averaging of Megatron's (`schedules.py:forward_step_calc_loss`,
  `distributed_data_parallel.py:254`), and `schedule.py` switches off the division by the number of
  tokens that it would bring instead;
* the vocabulary is padded to a multiple of the tensor-parallel size; the padded rows exist only in
  memory and never get probability (`logprobs.py`).

Letters in shapes: t tokens of a packed row, h hidden size, n selected tokens, V padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_matpo.config import Config
from megatron_matpo.config.hf_model import HfModelConfig, check_layout
from megatron_matpo.errors import ConfigError
from megatron_matpo.megatron.attention import PackedAttention
from megatron_matpo.megatron.layer_spec import block_spec, family_settings, require_engine
from megatron_matpo.megatron.lora import add_adapters, describe_shards
from megatron_matpo.megatron.memory_policy import recompute_options
from megatron_matpo.megatron.parallel import ParallelState
from megatron_matpo.megatron.precision import (
    ddp_settings,
    fused_kernels,
    parameter_dtype,
    resolve_precision,
    transformer_settings,
)
from megatron_matpo.megatron.rope import inverse_frequencies


class PolicyModel(GPTModel):
    """GPTModel whose forward ends at the hidden states, on the last stage too.

    Log-probs are needed for sampled tokens only, which are a minority of a trajectory with tool
    replies; so `logprobs.py` applies the output layer to chosen rows, not to everything.
    """

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[t, 1, h], after the final norm, at the end of the model; before it [t/tp, 1, h] or all.

        Sequence parallelism ends here: any row may be chosen next. All tensor-parallel ranks go on
        with the same rows and sum the gradient of these in the output layer, so that the gradient
        that arrives here is the same on all, and each rank takes its part of it.
        """
        if not (self.post_process and self.config.sequence_parallel):
            return hidden_states
        return gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False
        )

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron's description for checkpoints, which knows nothing of adapters."""
        return describe_shards(self, super().sharded_state_dict(*args, **kwargs))

    def output_weight(self) -> Tensor:
        """[V/tp, h] of the output layer, the embedding's if they are tied. Last stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        weight = self.output_layer.weight
        assert weight is not None, "the output layer has no weight of its own if they are tied"
        return weight


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
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=state.tp_size,
        pipeline_model_parallel_size=state.pp_size,
        virtual_pipeline_model_parallel_size=state.vp_size if state.vp_size > 1 else None,
        sequence_parallel=config.parallel.splits_sequence,
        expert_model_parallel_size=state.ep_size,
        # Experts are whole; Megatron would take the tensor-parallel size.
        expert_tensor_parallel_size=1,
        context_parallel_size=state.cp_size,
        **transformer_settings(config, resolve_precision(config)),
        # Weights come from `hf_io` in every case. Not `perform_initialization=False`: that also
        # leaves out the marks by which the gradient norm counts every split parameter.
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        use_cpu_initialization=False,
        calculate_per_token_loss=True,
        # Micro-batches differ in length. Megatron refuses that under pipeline parallelism unless
        # the dispatcher of a mixture of experts is `alltoall`, also for a dense model. Not with
        # chunks: shapes are exchanged before the tensors, both ways at once, which deadlocks where
        # a send waits for its receiver (`p2p_communication.py:205-238`); see `schedule.py`.
        variable_seq_lengths=state.pp_size > 1 and state.vp_size == 1,
        # With two stages a batch of sends and receives mixes up the two directions; Megatron's
        # other way has a process group for each.
        batch_p2p_comm=state.vp_size == 1,
        # A stage's output is sent away, and only its history is needed until the backward pass.
        deallocate_pipeline_outputs=state.pp_size > 1,
        moe_token_dispatcher_type="alltoall",
        # The fused kernels need Apex or a compiler; on a CPU they only cost start-up time.
        bias_activation_fusion=not on_cpu,
        bias_dropout_fusion=not on_cpu,
        # Without it every layer waits for the samples' offsets to come to the host, twice.
        apply_rope_fusion=not on_cpu,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=fused_kernels(state.device.type).grad_accumulation,
        cuda_graph_impl="none",
        **family_settings(hf, on_cpu),
        **recompute_options(config.train),
    )


def build_model(config: Config, hf: HfModelConfig, state: ParallelState) -> list[PolicyModel]:
    """This rank's chunks of the model, first layers first, with uninitialised weights.

    Every trainer rank calls; stages with tied embeddings communicate.

    Raises:
        ConfigError: the layout does not divide the model, or the platform lacks a part.
    """
    problems = check_layout(hf, config.parallel, on_gpu=config.cluster.device == "cuda")
    if problems:
        raise ConfigError("\n".join(problems))
    if state.device.type != "cpu":
        require_engine()
    megatron = transformer_config(config, hf, state)
    models = [_build_chunk(config, hf, state, megatron, chunk) for chunk in range(state.vp_size)]
    add_adapters(models, hf, config.lora, state)
    return models


def _build_chunk(
    config: Config,
    hf: HfModelConfig,
    state: ParallelState,
    megatron: TransformerConfig,
    chunk: int,
) -> PolicyModel:
    """One chunk of this rank's stage."""
    vp_stage = chunk if state.vp_size > 1 else None
    model = PolicyModel(
        megatron,
        # Takes the layers themselves, too, though annotated otherwise.
        block_spec(megatron, hf, state, vp_stage, PackedAttention),  # type: ignore[arg-type]
        vocab_size=padded_vocab_size(hf, state.tp_size),
        max_sequence_length=hf.max_positions,
        pre_process=state.is_first_stage and chunk == 0,
        post_process=state.is_last_stage and chunk == state.vp_size - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=hf.rope_theta,  # type: ignore[arg-type]  (Megatron divides by a power of it)
        vp_stage=vp_stage,
    )
    model.rotary_pos_emb.inv_freq = inverse_frequencies(hf).to(state.device)
    if model.post_process and megatron.sequence_parallel:
        # It gets chosen rows of the whole sequence, the same on all ranks; see `_postprocess`.
        model.output_layer.sequence_parallel = False
        model.output_layer.allreduce_dgrad = True
    _mark_experts(model)
    # The local spec's norms ignore params_dtype.
    return model.to(device=state.device, dtype=parameter_dtype(config))


def _mark_experts(model: PolicyModel) -> None:
    """Reduce experts' gradients over their own replicas, whatever the layout.

    Experts are not split by tensor parallelism, so the tensor-parallel ranks of a stage hold
    different experts or, with fewer expert-parallel ranks, replicas that see different tokens.
    Megatron marks them only if `expert_model_parallel_size` is above 1 (`layers.py:880`).
    """
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]
            # Every rank's part counts in the gradient norm.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def wrap_ddp(config: Config, models: list[PolicyModel]) -> list[DistributedDataParallel]:
    """Wrap each chunk for data parallelism: flat fp32 gradient buffers, summed over the ranks."""
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        average_in_collective=False,
        **ddp_settings(config, resolve_precision(config)),
    )
    return [DistributedDataParallel(model.config, ddp_config, model) for model in models]


def unwrap(model: Any) -> PolicyModel:
    """The PolicyModel inside `model`."""
    while not isinstance(model, PolicyModel):
        model = model.module
    return model
