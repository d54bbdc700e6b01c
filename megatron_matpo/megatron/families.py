"""Which Hugging Face tensors form which Megatron parameter, per family, as one table of rules.

A rule names the parameter, the tensors with their dimensions, and how the parameter lies over the
ranks; a family's layer is a sequence of shared rules. `mapping.py` reads the table in both
directions. Megatron's names come in pairs where Transformer Engine's spec has fused modules.

Letters in dimensions: h hidden, q all query heads, k all key (or value) heads, d one head,
f feed-forward, m feed-forward of one expert, e experts, v real vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from megatron_matpo.config.hf_model import HfModelConfig


class Sharding(StrEnum):
    """How a parameter lies over the tensor-parallel ranks."""

    REPLICATED = "replicated"
    ROW = "row"
    """Input channels (dimension 1) are split."""
    VOCAB = "vocab"
    """Rows are split after padding with zeros: [V/tp, h]."""
    QKV = "qkv"
    """Rows are split after interleaving by kv group: per group its query heads, then its key, then
    its value head. With fewer groups than ranks a rank holds a part of one group's rows."""
    GATED = "gated"
    """Rows of gate and up are split separately: [f/tp gate rows; f/tp up rows]."""
    STACKED = "stacked"
    """Gate rows over up rows, whole: an expert lies on one rank of its expert-parallel group."""

    @property
    def is_split(self) -> bool:
        """Whether tensor-parallel ranks hold different parts."""
        return self not in (Sharding.REPLICATED, Sharding.STACKED)


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the HF tensors that form it.

    Names may hold `{i}`, the layer, and `{e}`, the expert; on the Megatron side both count from 0
    inside the rank's part.
    """

    megatron: tuple[str, ...]
    """Names to look for, in order: the local spec's, then Transformer Engine's."""
    hf: Mapping[str, str]
    """Tensor name -> its dimensions, by letter."""
    sharding: Sharding = Sharding.REPLICATED

    @property
    def is_expert(self) -> bool:
        """Whether there is one such parameter per expert."""
        return "{e}" in self.megatron[0]


def _layer(megatron: tuple[str, ...], hf: dict[str, str], sharding: Sharding) -> Rule:
    """A rule whose names are given relative to a layer."""
    return Rule(
        tuple(f"decoder.layers.{{i}}.{name}" for name in megatron),
        {f"model.layers.{{i}}.{name}": dims for name, dims in hf.items()},
        sharding,
    )


EMBEDDING = Rule(
    ("embedding.word_embeddings.weight",), {"model.embed_tokens.weight": "vh"}, Sharding.VOCAB
)
FINAL_NORM = Rule(("decoder.final_layernorm.weight",), {"model.norm.weight": "h"})
OUTPUT = Rule(("output_layer.weight",), {"lm_head.weight": "vh"}, Sharding.VOCAB)
# With tied embeddings a last stage that is not also the first holds a copy of the embedding.
TIED_OUTPUT = Rule(OUTPUT.megatron, EMBEDDING.hf, Sharding.VOCAB)

ATTENTION_NORM = _layer(
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    {"input_layernorm.weight": "h"},
    Sharding.REPLICATED,
)
QKV = _layer(
    ("self_attention.linear_qkv.weight",),
    {
        "self_attn.q_proj.weight": "qh",
        "self_attn.k_proj.weight": "kh",
        "self_attn.v_proj.weight": "kh",
    },
    Sharding.QKV,
)
QKV_BIAS = _layer(
    ("self_attention.linear_qkv.bias",),
    {"self_attn.q_proj.bias": "q", "self_attn.k_proj.bias": "k", "self_attn.v_proj.bias": "k"},
    Sharding.QKV,
)
Q_NORM = _layer(
    ("self_attention.q_layernorm.weight",), {"self_attn.q_norm.weight": "d"}, Sharding.REPLICATED
)
K_NORM = _layer(
    ("self_attention.k_layernorm.weight",), {"self_attn.k_norm.weight": "d"}, Sharding.REPLICATED
)
ATTENTION_OUT = _layer(
    ("self_attention.linear_proj.weight",), {"self_attn.o_proj.weight": "hq"}, Sharding.ROW
)
MLP_NORM = _layer(
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    {"post_attention_layernorm.weight": "h"},
    Sharding.REPLICATED,
)
MLP_IN = _layer(
    ("mlp.linear_fc1.weight",),
    {"mlp.gate_proj.weight": "fh", "mlp.up_proj.weight": "fh"},
    Sharding.GATED,
)
MLP_OUT = _layer(("mlp.linear_fc2.weight",), {"mlp.down_proj.weight": "hf"}, Sharding.ROW)
ROUTER = _layer(("mlp.router.weight",), {"mlp.gate.weight": "eh"}, Sharding.REPLICATED)
# One module per expert, or Transformer Engine's grouped matrices.
EXPERT_IN = _layer(
    ("mlp.experts.local_experts.{e}.linear_fc1.weight", "mlp.experts.linear_fc1.weight{e}"),
    {"mlp.experts.{e}.gate_proj.weight": "mh", "mlp.experts.{e}.up_proj.weight": "mh"},
    Sharding.STACKED,
)
EXPERT_OUT = _layer(
    ("mlp.experts.local_experts.{e}.linear_fc2.weight", "mlp.experts.linear_fc2.weight{e}"),
    {"mlp.experts.{e}.down_proj.weight": "hm"},
    Sharding.REPLICATED,
)


def layer_rules(hf: HfModelConfig, layer: int) -> Iterator[Rule]:
    """Rules of a decoder layer, in export order; those of experts follow one another."""
    yield ATTENTION_NORM
    yield QKV
    if hf.qkv_bias:
        yield QKV_BIAS
    if hf.qk_norm:
        yield from (Q_NORM, K_NORM)
    yield from (ATTENTION_OUT, MLP_NORM)
    if hf.is_moe_layer(layer):
        yield from (ROUTER, EXPERT_IN, EXPERT_OUT)
    else:
        yield from (MLP_IN, MLP_OUT)


def dimensions(hf: HfModelConfig) -> dict[str, int]:
    """Size by letter."""
    moe = hf.moe
    return {
        "h": hf.hidden_size,
        "q": hf.num_heads * hf.head_dim,
        "k": hf.num_kv_heads * hf.head_dim,
        "d": hf.head_dim,
        "f": hf.ffn_size,
        "m": moe.ffn_size if moe else 0,
        "e": moe.num_experts if moe else 0,
        "v": hf.vocab_size,
    }
