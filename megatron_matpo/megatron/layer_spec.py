"""The modules of a stage, layer by layer: Megatron's own on CPU, Transformer Engine's on GPU."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.errors import ConfigError
from megatron_matpo.megatron.parallel import ParallelState


class LocalRMSNorm(nn.RMSNorm):
    """torch's RMS norm as the local spec wants it, also under sequence parallelism.

    Megatron's `WrappedTorchNorm` is the same without the mark by which `finalize_model_grads` sums
    the weight's gradient over the tensor-parallel ranks, and refuses sequence parallelism.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        """Take what Megatron passes to a norm; no option of it is used here."""
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def family_settings(hf: HfModelConfig, on_cpu: bool) -> dict[str, Any]:
    """What a family adds to Megatron's `TransformerConfig`."""
    settings: dict[str, Any] = {"qk_layernorm": hf.qk_norm, "add_qkv_bias": hf.qkv_bias}
    if hf.sliding_window is not None:
        # Megatron counts the tokens to the left of a token, transformers the token itself as well.
        settings["window_size"] = (hf.sliding_window - 1, 0)
    if hf.moe is not None:
        settings |= {
            "num_moe_experts": hf.moe.num_experts,
            "moe_router_topk": hf.moe.experts_per_token,
            "moe_ffn_hidden_size": hf.moe.ffn_size,
            "moe_layer_freq": [int(is_moe) for is_moe in hf.moe.layers],
            # Softmax over the chosen experts' logits is softmax over all, chosen and normalised.
            "moe_router_pre_softmax": not hf.moe.normalize,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_grouped_gemm": not on_cpu,
        }
    return settings


def block_spec(
    config: TransformerConfig,
    hf: HfModelConfig,
    state: ParallelState,
    vp_stage: int | None,
    local_attention: type[nn.Module],
) -> TransformerBlockSubmodules:
    """Layers and final norm of a chunk.

    Args:
        config: Megatron's configuration.
        hf: shape of the model.
        state: this rank's position.
        vp_stage: chunk inside the stage; None without virtual stages.
        local_attention: core attention of the local spec.

    Raises:
        ConfigError: on a GPU without Transformer Engine.
    """
    build = _local_layer if state.device.type == "cpu" else _engine_layer
    layer_norm: Any = LocalRMSNorm
    if state.device.type != "cpu":
        require_engine()
        from megatron.core.extensions.transformer_engine import TENorm

        layer_norm = TENorm
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    specs = [
        build(hf, hf.is_moe_layer(layer), local_attention)
        for layer in range(offset, offset + count)
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=layer_norm)


def _local_layer(hf: HfModelConfig, is_moe: bool, core_attention: type[nn.Module]) -> Any:
    """One layer of Megatron's own modules; experts one after the other."""
    spec: Any = get_gpt_layer_local_spec(
        num_experts=hf.moe.num_experts if hf.moe and is_moe else None,
        qk_layernorm=hf.qk_norm,
        normalization="RMSNorm",
    )
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    attention.core_attention = core_attention
    layer.input_layernorm = layer.pre_mlp_layernorm = LocalRMSNorm
    if hf.qk_norm:
        attention.q_layernorm = attention.k_layernorm = LocalRMSNorm
    if is_moe:
        # Names in checkpoints are those of Transformer Engine's spec, which has nothing to fuse
        # this norm with in such a layer.
        del layer.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return spec


def _engine_layer(hf: HfModelConfig, is_moe: bool, _: type[nn.Module]) -> Any:
    """One layer of Transformer Engine's modules; experts as grouped matrix products."""
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=hf.moe.num_experts if hf.moe and is_moe else None,
        moe_grouped_gemm=is_moe,
        qk_layernorm=hf.qk_norm,
    )


def require_engine() -> None:
    """Raise ConfigError without Transformer Engine."""
    try:
        import transformer_engine.pytorch  # noqa: F401  (only whether it is there)
    except ImportError as error:
        raise ConfigError(
            "cluster.gpus_per_node > 0 needs Transformer Engine in the trainer's environment "
            f"(import failed: {error}); use the project's image, or cluster.gpus_per_node=0"
        ) from error
