"""How an SGLang engine holds the tensors of a Hugging Face folder: fused and cut for its ranks.

Source: SGLang 0.5.20, layers/linear.py, layers/vocab_parallel_embedding.py and models/qwen3.py.
Query, key and value are one parameter, gate and up another; tensor-parallel ranks hold rows of
these, columns of the output and down projections, and rows of the padded vocabulary. Experts are
stacked and laid out for a kernel that the engine chooses: they have no place here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

_FUSED = {
    "q_proj": ("qkv_proj", 0, 3),
    "k_proj": ("qkv_proj", 1, 3),
    "v_proj": ("qkv_proj", 2, 3),
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
}
"""Module -> the engine's module, place in it, number of places."""
_BY_COLUMNS = {"o_proj", "down_proj"}
_BY_VOCABULARY = {"embed_tokens", "lm_head"}
_VOCABULARY_MULTIPLE = 64
_CPU_FFN_MULTIPLE = 32
"""For each rank. Source: SGLang 0.5.20, configs/update_config.py."""


@dataclass(frozen=True)
class EngineShape:
    """What decides how an engine cuts the weights."""

    num_ranks: int
    """Tensor-parallel ranks of one engine."""
    num_kv_heads: int
    dtype: torch.dtype
    """In which it holds them."""
    on_cpu: bool = False
    """There SGLang pads the feed-forward dimension with zeros."""


@dataclass
class EngineLayout:
    """Turns a stream of named tensors into the engine's parameters, as soon as one is complete."""

    shape: EngineShape
    _parts: dict[str, dict[int, Tensor]] = field(default_factory=dict[str, dict[int, Tensor]])

    def take(self, name: str, tensor: Tensor) -> Iterator[tuple[str, list[Tensor]]]:
        """The engine's name and each rank's part of every parameter that `tensor` completes.

        Experts complete nothing: their layout is not known here.
        """
        if ".experts." in name:
            return
        *path, module, kind = name.split(".")
        fused, place, count = _FUSED.get(module, (module, 0, 1))
        engine_name = ".".join((*path, fused, kind))
        parts = self._parts.setdefault(engine_name, {})
        parts[place] = tensor.detach()
        if len(parts) == count:
            del self._parts[engine_name]
            ranks = range(self.shape.num_ranks)
            ordered = [parts[i] for i in range(count)]
            yield engine_name, [self._of_rank(fused, ordered, rank) for rank in ranks]

    def _of_rank(self, module: str, parts: list[Tensor], rank: int) -> Tensor:
        if module == "qkv_proj":
            query, key, value = parts
            cut = [self._rows(query, rank), self._kv_rows(key, rank), self._kv_rows(value, rank)]
            mine = torch.cat(cut)
        elif module == "gate_up_proj":
            mine = torch.cat([self._rows(self._padded(part, 0), rank) for part in parts])
        elif module in _BY_COLUMNS and parts[0].dim() > 1:
            whole = self._padded(parts[0], 1) if module == "down_proj" else parts[0]
            mine = whole.chunk(self.shape.num_ranks, dim=1)[rank]
        elif module in _BY_VOCABULARY:
            mine = self._vocabulary(parts[0], rank)
        else:
            (mine,) = parts
        return mine.to(self.shape.dtype)

    def _padded(self, tensor: Tensor, dim: int) -> Tensor:
        """With zeros behind the feed-forward dimension `dim`."""
        missing = -tensor.shape[dim] % (_CPU_FFN_MULTIPLE * self.shape.num_ranks)
        if not self.shape.on_cpu or not missing:
            return tensor
        return torch.nn.functional.pad(tensor, (0, missing) if dim else (0, 0, 0, missing))

    def _rows(self, tensor: Tensor, rank: int) -> Tensor:
        return tensor.chunk(self.shape.num_ranks)[rank]

    def _kv_rows(self, tensor: Tensor, rank: int) -> Tensor:
        """With fewer heads than ranks, neighbours hold the same head."""
        holders = max(1, self.shape.num_ranks // self.shape.num_kv_heads)
        return tensor.chunk(self.shape.num_ranks // holders)[rank // holders]

    def _vocabulary(self, tensor: Tensor, rank: int) -> Tensor:
        """Rows of the vocabulary padded with zeros."""
        rows = -(-tensor.shape[0] // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        rows //= self.shape.num_ranks
        mine = tensor[rank * rows : (rank + 1) * rows]
        if len(mine) == rows:
            return mine
        return torch.cat([mine, mine.new_zeros(rows - len(mine), *mine.shape[1:])])
