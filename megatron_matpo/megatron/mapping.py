"""Which Hugging Face tensor is which Megatron parameter, and how it is split.

One table, read in both directions; every rule is a pure rearrangement, so values survive a round
trip bit for bit. Letters in shapes: h hidden, f feed-forward, d head size, q heads, g kv heads,
v real vocabulary, V vocabulary padded to a multiple of tp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from megatron_matpo.config.hf_model import HfModelConfig

Slicer = Callable[[str, int | None, int, int], Tensor]
"""(HF name, dimension or None, start, stop) -> that part of the tensor, or all of it for None."""


class Sharding(StrEnum):
    """How a parameter lies over the tensor-parallel ranks."""

    REPLICATED = "replicated"
    ROW = "row"
    """Input channels (dimension 1) are split."""
    VOCAB = "vocab"
    """Rows are split after padding with zeros: [V/tp, h]."""
    QKV = "qkv"
    """Rows are split by kv group: per group its query heads, then its key, then its value head."""
    GATED = "gated"
    """Rows of gate and up are split separately: [f/tp gate rows; f/tp up rows]."""


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter (one per layer with `{i}`) and the HF tensors that form it."""

    megatron: tuple[str, ...]
    """Names to look for, in order: the local spec's, then Transformer Engine's fused one."""
    hf: tuple[str, ...]
    sharding: Sharding


_LAYER = "decoder.layers.{i}."
_HF_LAYER = "model.layers.{i}."

EMBEDDING = Rule(
    ("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), Sharding.VOCAB
)
LAYER_RULES = (
    Rule(
        (_LAYER + "input_layernorm.weight", _LAYER + "self_attention.linear_qkv.layer_norm_weight"),
        (_HF_LAYER + "input_layernorm.weight",),
        Sharding.REPLICATED,
    ),
    Rule(
        (_LAYER + "self_attention.linear_qkv.weight",),
        tuple(_HF_LAYER + f"self_attn.{x}_proj.weight" for x in "qkv"),
        Sharding.QKV,
    ),
    Rule(
        (_LAYER + "self_attention.q_layernorm.weight",),
        (_HF_LAYER + "self_attn.q_norm.weight",),
        Sharding.REPLICATED,
    ),
    Rule(
        (_LAYER + "self_attention.k_layernorm.weight",),
        (_HF_LAYER + "self_attn.k_norm.weight",),
        Sharding.REPLICATED,
    ),
    Rule(
        (_LAYER + "self_attention.linear_proj.weight",),
        (_HF_LAYER + "self_attn.o_proj.weight",),
        Sharding.ROW,
    ),
    Rule(
        (_LAYER + "pre_mlp_layernorm.weight", _LAYER + "mlp.linear_fc1.layer_norm_weight"),
        (_HF_LAYER + "post_attention_layernorm.weight",),
        Sharding.REPLICATED,
    ),
    Rule(
        (_LAYER + "mlp.linear_fc1.weight",),
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        Sharding.GATED,
    ),
    Rule((_LAYER + "mlp.linear_fc2.weight",), (_HF_LAYER + "mlp.down_proj.weight",), Sharding.ROW),
)
FINAL_NORM = Rule(("decoder.final_layernorm.weight",), ("model.norm.weight",), Sharding.REPLICATED)
OUTPUT = Rule(("output_layer.weight",), ("lm_head.weight",), Sharding.VOCAB)
# With tied embeddings a last stage that is not also the first holds a copy of the embedding.
TIED_OUTPUT = Rule(OUTPUT.megatron, EMBEDDING.hf, Sharding.VOCAB)


@dataclass(frozen=True)
class Placed:
    """A rule applied to one layer and one pipeline stage."""

    stage: int
    megatron: tuple[str, ...]
    """Candidate names inside that stage's model (its layers count from 0)."""
    hf: tuple[str, ...]
    sharding: Sharding
    is_copy: bool = False
    """Holds what another stage owns: loaded, never exported."""

    def parameter(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The parameter of this rule among a model's named parameters."""
        for name in self.megatron:
            if name in parameters:
                return parameters[name]
        raise AssertionError(f"the model has none of {self.megatron}")


def placed_rules(hf: HfModelConfig, pp_size: int) -> Iterator[Placed]:
    """All rules in export order, which is the same for every layout."""
    last = pp_size - 1
    per_stage = hf.num_layers // pp_size
    yield Placed(0, EMBEDDING.megatron, EMBEDDING.hf, EMBEDDING.sharding)
    for layer in range(hf.num_layers):
        stage, local = divmod(layer, per_stage)
        for rule in LAYER_RULES:
            yield Placed(
                stage,
                tuple(name.format(i=local) for name in rule.megatron),
                tuple(name.format(i=layer) for name in rule.hf),
                rule.sharding,
            )
    yield Placed(last, FINAL_NORM.megatron, FINAL_NORM.hf, FINAL_NORM.sharding)
    if not hf.tie_word_embeddings:
        yield Placed(last, OUTPUT.megatron, OUTPUT.hf, OUTPUT.sharding)
    elif pp_size > 1:
        yield Placed(last, TIED_OUTPUT.megatron, TIED_OUTPUT.hf, TIED_OUTPUT.sharding, is_copy=True)


def hf_shapes(hf: HfModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the folder, by name, in export order."""
    h, d = hf.hidden_size, hf.head_dim
    by_suffix = {
        "embed_tokens.weight": (hf.vocab_size, h),
        "lm_head.weight": (hf.vocab_size, h),
        "q_proj.weight": (hf.num_heads * d, h),
        "k_proj.weight": (hf.num_kv_heads * d, h),
        "v_proj.weight": (hf.num_kv_heads * d, h),
        "o_proj.weight": (h, hf.num_heads * d),
        "q_norm.weight": (d,),
        "k_norm.weight": (d,),
        "gate_proj.weight": (hf.ffn_size, h),
        "up_proj.weight": (hf.ffn_size, h),
        "down_proj.weight": (h, hf.ffn_size),
    }
    shapes = {}
    for rule in placed_rules(hf, 1):
        for name in rule.hf:
            suffix = name if name in by_suffix else ".".join(name.split(".")[-2:])
            shapes[name] = by_suffix.get(suffix, (h,))
    return shapes


def local_part(rule: Placed, read: Slicer, hf: HfModelConfig, tp_rank: int, tp_size: int) -> Tensor:
    """This tensor-parallel rank's parameter, reading only what it needs of each tensor."""
    if rule.sharding is Sharding.REPLICATED:
        return read(rule.hf[0], None, 0, 0)
    if rule.sharding is Sharding.ROW:
        columns = hf_shapes(hf)[rule.hf[0]][1] // tp_size
        return read(rule.hf[0], 1, tp_rank * columns, (tp_rank + 1) * columns)
    if rule.sharding is Sharding.VOCAB:
        rows = -(-hf.vocab_size // tp_size)
        start, stop = (min(r * rows, hf.vocab_size) for r in (tp_rank, tp_rank + 1))
        part = read(rule.hf[0], 0, start, stop)
        return torch.cat([part, part.new_zeros(rows - (stop - start), part.shape[1])])
    if rule.sharding is Sharding.GATED:
        rows = hf.ffn_size // tp_size
        return torch.cat([read(name, 0, tp_rank * rows, (tp_rank + 1) * rows) for name in rule.hf])
    groups = hf.num_kv_heads // tp_size
    parts = []
    for name, heads in zip(rule.hf, _heads_per_group(hf), strict=True):
        rows = groups * heads * hf.head_dim
        part = read(name, 0, tp_rank * rows, (tp_rank + 1) * rows)
        parts.append(part.view(groups, heads * hf.head_dim, -1))
    return torch.cat(parts, dim=1).flatten(0, 1)


def hf_tensors(rule: Placed, shards: Sequence[Tensor], hf: HfModelConfig) -> dict[str, Tensor]:
    """The inverse of `local_part`: all ranks' parameters -> full tensors by Hugging Face name."""
    if rule.sharding is Sharding.REPLICATED:
        return {rule.hf[0]: shards[0]}
    if rule.sharding is Sharding.ROW:
        return {rule.hf[0]: torch.cat(list(shards), dim=1)}
    if rule.sharding is Sharding.VOCAB:
        return {rule.hf[0]: torch.cat(list(shards))[: hf.vocab_size]}
    if rule.sharding is Sharding.GATED:
        halves = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return {name: torch.cat(parts) for name, parts in zip(rule.hf, halves, strict=True)}
    full = torch.cat(list(shards)).unflatten(0, (hf.num_kv_heads, -1))
    sizes = [heads * hf.head_dim for heads in _heads_per_group(hf)]
    parts = full.split(sizes, dim=1)
    return {
        name: part.flatten(0, 1).contiguous() for name, part in zip(rule.hf, parts, strict=True)
    }


def _heads_per_group(hf: HfModelConfig) -> tuple[int, int, int]:
    """Query, key and value heads in one kv group."""
    return hf.num_heads // hf.num_kv_heads, 1, 1
