"""The table of `families.py` applied to a layout: names per stage, and parts of tensors.

Every rule is a pure rearrangement, so values survive a round trip bit for bit. Letters in shapes:
h hidden, f feed-forward, d head size, v real vocabulary, V vocabulary padded to a multiple of tp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.megatron import families
from megatron_matpo.megatron.families import Rule, Sharding

Slicer = Callable[[str, int | None, int, int], Tensor]
"""(HF name, dimension or None, start, stop) -> that part of the tensor, or all of it for None."""


@dataclass(frozen=True)
class Placed:
    """A rule applied to one layer (and expert), where it lies in a layout."""

    stage: int
    megatron: tuple[str, ...]
    """Candidate names inside that chunk (its layers and experts count from 0)."""
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of the HF tensors."""
    sharding: Sharding
    chunk: int = 0
    """Virtual pipeline chunk inside the stage."""
    expert_rank: int | None = None
    """The expert-parallel rank that holds it; None for what every rank of the stage holds."""
    is_copy: bool = False
    """Holds what another stage owns: loaded, never exported."""

    def parameter(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The parameter of this rule among a chunk's named parameters."""
        for name in self.megatron:
            if name in parameters:
                return parameters[name]
        raise AssertionError(f"the model has none of {self.megatron}")


def placed_rules(
    hf: HfModelConfig, pp_size: int = 1, vp_size: int = 1, ep_size: int = 1
) -> Iterator[Placed]:
    """All rules in export order, which is the same for every layout.

    Args:
        hf: shape of the model.
        pp_size: pipeline stages.
        vp_size: chunks per stage; layers go round the stages once per chunk.
        ep_size: ranks that share the experts of a layer.
    """
    sizes = families.dimensions(hf)
    last = (pp_size - 1, vp_size - 1)
    per_chunk = hf.num_layers // (pp_size * vp_size)
    yield _place(families.EMBEDDING, sizes, (0, 0))
    for layer in range(hf.num_layers):
        block, local = divmod(layer, per_chunk)
        chunk, stage = divmod(block, pp_size)
        for rule in families.layer_rules(hf, layer):
            for expert in range(hf.moe.num_experts if rule.is_expert and hf.moe else 1):
                per_rank = sizes["e"] // ep_size if rule.is_expert else 1
                rank, local_expert = divmod(expert, per_rank)
                yield _place(
                    rule,
                    sizes,
                    (stage, chunk),
                    local={"i": local, "e": local_expert},
                    overall={"i": layer, "e": expert},
                    expert_rank=rank if rule.is_expert else None,
                )
    yield _place(families.FINAL_NORM, sizes, last)
    if not hf.tie_word_embeddings:
        yield _place(families.OUTPUT, sizes, last)
    elif pp_size > 1:
        yield _place(families.TIED_OUTPUT, sizes, last, is_copy=True)


def _place(
    rule: Rule,
    sizes: dict[str, int],
    where: tuple[int, int],
    *,
    local: dict[str, int] | None = None,
    overall: dict[str, int] | None = None,
    expert_rank: int | None = None,
    is_copy: bool = False,
) -> Placed:
    """A rule with its numbers filled in; `local` on the Megatron side, `overall` on the other."""
    return Placed(
        stage=where[0],
        megatron=tuple(name.format(**local or {}) for name in rule.megatron),
        hf=tuple(name.format(**overall or {}) for name in rule.hf),
        shapes=tuple(tuple(sizes[letter] for letter in dims) for dims in rule.hf.values()),
        sharding=rule.sharding,
        chunk=where[1],
        expert_rank=expert_rank,
        is_copy=is_copy,
    )


def hf_shapes(hf: HfModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the folder, by name, in export order."""
    return {
        name: shape
        for rule in placed_rules(hf)
        for name, shape in zip(rule.hf, rule.shapes, strict=True)
    }


def local_part(rule: Placed, read: Slicer, hf: HfModelConfig, tp_rank: int, tp_size: int) -> Tensor:
    """This tensor-parallel rank's parameter, reading only what it needs of each tensor."""
    match rule.sharding:
        case Sharding.REPLICATED:
            return read(rule.hf[0], None, 0, 0)
        case Sharding.STACKED:
            return torch.cat([read(name, None, 0, 0) for name in rule.hf])
        case Sharding.ROW:
            columns = rule.shapes[0][1] // tp_size
            return read(rule.hf[0], 1, tp_rank * columns, (tp_rank + 1) * columns)
        case Sharding.VOCAB:
            rows = -(-hf.vocab_size // tp_size)
            start, stop = (min(r * rows, hf.vocab_size) for r in (tp_rank, tp_rank + 1))
            part = read(rule.hf[0], 0, start, stop)
            return torch.cat([part, part.new_zeros(rows - (stop - start), part.shape[1])])
        case Sharding.GATED:
            rows = rule.shapes[0][0] // tp_size
            start, stop = tp_rank * rows, (tp_rank + 1) * rows
            return torch.cat([read(name, 0, start, stop) for name in rule.hf])
        case Sharding.QKV:
            return _qkv_part(rule, read, hf, tp_rank, tp_size)


def _qkv_part(rule: Placed, read: Slicer, hf: HfModelConfig, tp_rank: int, tp_size: int) -> Tensor:
    """An equal share of the rows of all groups; it may begin or end inside a group.

    Source: Megatron-Core 0.16.1, `attention.py:1390` (a rank's rows are gathered again where there
    are fewer groups than ranks).
    """
    heads = _rows_per_group(hf)
    rows = hf.num_kv_heads * sum(heads) // tp_size
    start, stop = tp_rank * rows, (tp_rank + 1) * rows
    # (tensor, first row, last row) in the order of the parameter.
    pieces: list[tuple[int, int, int]] = []
    position = 0
    for group in range(hf.num_kv_heads):
        for index, size in enumerate(heads):
            first, last = max(start - position, 0), min(stop - position, size)
            if first < last:
                pieces.append((index, group * size + first, group * size + last))
            position += size
    # One read per tensor: what a rank needs of it is one range.
    parts: dict[int, tuple[int, Tensor]] = {}
    for index in {index for index, _, _ in pieces}:
        first = min(a for i, a, _ in pieces if i == index)
        last = max(b for i, _, b in pieces if i == index)
        parts[index] = first, read(rule.hf[index], 0, first, last)
    return torch.cat([parts[i][1][a - parts[i][0] : b - parts[i][0]] for i, a, b in pieces])


def hf_tensors(rule: Placed, shards: Sequence[Tensor], hf: HfModelConfig) -> dict[str, Tensor]:
    """The inverse of `local_part`: all ranks' parameters -> full tensors by Hugging Face name."""
    match rule.sharding:
        case Sharding.REPLICATED:
            return {rule.hf[0]: shards[0]}
        case Sharding.ROW:
            return {rule.hf[0]: torch.cat(list(shards), dim=1)}
        case Sharding.VOCAB:
            return {rule.hf[0]: torch.cat(list(shards))[: hf.vocab_size]}
        case Sharding.GATED | Sharding.STACKED:
            halves = zip(*(shard.chunk(2) for shard in shards), strict=True)
            return {name: torch.cat(parts) for name, parts in zip(rule.hf, halves, strict=True)}
        case Sharding.QKV:
            full = torch.cat(list(shards)).unflatten(0, (hf.num_kv_heads, -1))
            parts = full.split(list(_rows_per_group(hf)), dim=1)
            return {
                name: part.flatten(0, 1).contiguous()
                for name, part in zip(rule.hf, parts, strict=True)
            }


def _rows_per_group(hf: HfModelConfig) -> tuple[int, int, int]:
    """Rows of query, key and value in one kv group."""
    return hf.num_heads // hf.num_kv_heads * hf.head_dim, hf.head_dim, hf.head_dim
