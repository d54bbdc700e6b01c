"""Weights between Hugging Face folders and this rank's part of the model.

Invariants:

* no rank reads more of a folder than its own part plus one tensor;
* full tensors exist one at a time, on global rank 0 only;
* the order of `iter_hf_tensors` is the same for every layout and every call;
* a folder that `save_hf` wrote is complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.errors import ConfigError
from megatron_matpo.megatron.lora import is_adapter, merged_weight
from megatron_matpo.megatron.mapping import (
    Placed,
    Slicer,
    hf_shapes,
    hf_tensors,
    local_part,
    placed_rules,
)
from megatron_matpo.megatron.model import unwrap
from megatron_matpo.megatron.parallel import (
    ParallelState,
    expert_group,
    pipeline_group,
    tensor_group,
)
from megatron_matpo.megatron.safetensors_writer import INDEX, write_tensors
from megatron_matpo.obs.files import replace_folder

_SHARD_BYTES = 4 << 30
# What transformers initialises these families with (`initializer_range`).
_INIT_STD = 0.02


class _Folder:
    """Reads parts of tensors from the safetensors files of a folder."""

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._file_of = {name: folder / file for name, file in weight_map.items()}
        else:
            self._file_of = {}
            for file in sorted(folder.glob("*.safetensors")):
                with safe_open(file, framework="pt") as reader:
                    self._file_of |= dict.fromkeys(reader.keys(), file)
        if not self._file_of:
            raise ConfigError(f"model.path={str(folder)!r}: the folder has no *.safetensors file")
        self._folder = folder
        self._open_file: Path | None = None

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ConfigError if a tensor is missing."""
        missing = [name for name in shapes if name not in self._file_of]
        if missing:
            raise ConfigError(
                f"model.path={str(self._folder)!r}: {len(missing)} of {len(shapes)} tensors are "
                f"missing from the safetensors files, first {missing[0]!r}"
            )

    def read(self, name: str, dim: int | None, start: int, stop: int) -> Tensor:
        """See `mapping.Slicer`."""
        file = self._file_of[name]
        if file != self._open_file:
            # Rules follow the order of the files, so this happens about once per file.
            self._reader, self._open_file = safe_open(file, framework="pt"), file
        if dim is None:
            return self._reader.get_tensor(name)
        part = self._reader.get_slice(name)
        return part[start:stop] if dim == 0 else part[:, start:stop]


class _Random:
    """Seeded weights that depend on the name only, not on the layout or on who reads them."""

    def __init__(self, hf: HfModelConfig, seed: int) -> None:
        self._shapes, self._seed = hf_shapes(hf), seed

    def read(self, name: str, dim: int | None, start: int, stop: int) -> Tensor:
        """See `mapping.Slicer`. Norms are 1, biases 0, everything else is normal."""
        shape = self._shapes[name]
        if len(shape) == 1:
            full = torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
            return full if dim is None else full[start:stop]
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        full = torch.randn(shape, generator=generator).mul_(_INIT_STD)
        if dim is None:
            return full
        return full[start:stop] if dim == 0 else full[:, start:stop]


@torch.no_grad()
def _fill(models: Sequence[Any], hf: HfModelConfig, read: Slicer, state: ParallelState):
    """Copy every parameter of this rank from `read`, and make sure that none was forgotten."""
    chunks = parameters_of(models)
    filled = set()
    for rule in placed_rules(hf, state.pp_size, state.vp_size, state.ep_size):
        if rule.stage != state.pp_rank or rule.expert_rank not in (None, state.ep_rank):
            continue
        target = rule.parameter(chunks[rule.chunk])
        part = local_part(rule, read, hf, state.tp_rank, state.tp_size)
        if part.shape != target.shape:
            raise ConfigError(
                f"{hf.folder}: {', '.join(rule.hf)} give a parameter of shape {list(part.shape)}, "
                f"but config.json means {list(target.shape)}"
            )
        target.copy_(part)
        filled.add(id(target))
    forgotten = [
        name
        for chunk in chunks
        for name, p in chunk.items()
        if id(p) not in filled and not is_adapter(name)
    ]
    assert not forgotten, f"megatron.families has no rule for {forgotten}"


def parameters_of(models: Sequence[Any]) -> list[dict[str, Tensor]]:
    """Per chunk, parameters by name."""
    return [dict(unwrap(model).named_parameters()) for model in models]


def load_hf(
    models: Sequence[Any], hf: HfModelConfig, folder: str | Path, state: ParallelState
) -> None:
    """Fill this rank's parameters from `folder`. Every rank calls; nothing is communicated.

    Raises:
        ConfigError: no safetensors file, or a tensor is missing or has another shape than
            `config.json` says.
    """
    source = _Folder(Path(folder))
    source.check(hf_shapes(hf))
    _fill(models, hf, source.read, state)


def init_random(models: Sequence[Any], hf: HfModelConfig, seed: int, state: ParallelState) -> None:
    """Fill this rank's parameters with seeded random weights, the same for every layout."""
    _fill(models, hf, _Random(hf, seed).read, state)


def iter_hf_tensors(
    models: Sequence[Any],
    hf: HfModelConfig,
    state: ParallelState,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Full tensors by Hugging Face name, on global rank 0, on its device.

    Collective: every rank iterates to the end; ranks other than 0 get nothing out of it. A tensor
    belongs to the caller and is made only when asked for, so at most one is in flight. Waits are
    bounded by `train.timeout_s`.

    Args:
        models: this rank's chunks.
        hf: shape of the model.
        state: this rank's position.
        dtype: convert on the way; None keeps the parameters' own.
    """
    # The first replica of each stage, and the ranks that hold the rest of its experts.
    is_dense = state.is_first_holder
    if not is_dense and state.edp_rank:
        return
    chunks = parameters_of(models)
    dtype = dtype or next(iter(chunks[0].values())).dtype
    for rule in placed_rules(hf, state.pp_size, state.vp_size, state.ep_size):
        if rule.is_copy:
            continue
        full: dict[str, Tensor] = {}
        if rule.stage == state.pp_rank and rule.expert_rank is not None:
            full = _fetch_expert(rule, chunks[rule.chunk], hf, state, dtype)
        elif rule.stage == state.pp_rank and is_dense:
            full = _gather(rule, chunks[rule.chunk], hf, state, dtype)
        if rule.stage > 0 and is_dense and state.tp_rank == 0:
            full = _to_first_stage(rule, full, state, dtype)
        if state.rank == 0:
            yield from full.items()


def _fetch_expert(
    rule: Placed,
    parameters: dict[str, Tensor],
    hf: HfModelConfig,
    state: ParallelState,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Move an expert's parameter from the rank that holds it to the first rank of its stage.

    Only the expert-parallel group of that first rank takes part, which is its rank 0.
    """
    if state.edp_rank or state.ep_rank not in (0, rule.expert_rank):
        return {}
    # Names count from 0 inside a rank's experts, so rank 0 has one of the same name and shape.
    local = rule.parameter(parameters).detach()
    if rule.expert_rank == 0:
        return own_memory(hf_tensors(rule, [local.to(dtype)], hf), local)
    group = expert_group()
    if state.ep_rank:
        dist.send(local.to(dtype).contiguous(), dst=dist.get_global_rank(group, 0), group=group)
        return {}
    received = torch.empty_like(local, dtype=dtype)
    dist.recv(received, src=dist.get_global_rank(group, rule.expert_rank or 0), group=group)
    return hf_tensors(rule, [received], hf)


def _gather(
    rule: Placed,
    parameters: dict[str, Tensor],
    hf: HfModelConfig,
    state: ParallelState,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Collect the shards of a parameter on the first tensor-parallel rank of its stage."""
    parameter = merged_weight(rule.parameter(parameters))
    local = parameter.to(dtype).contiguous()
    shards = [local]
    if state.tp_size > 1 and rule.sharding.is_split:
        is_root = state.tp_rank == 0
        shards = [torch.empty_like(local) for _ in range(state.tp_size)] if is_root else []
        group = tensor_group()
        dist.gather(local, shards or None, dst=dist.get_global_rank(group, 0), group=group)
    return {} if state.tp_rank else own_memory(hf_tensors(rule, shards, hf), parameter)


def own_memory(full: dict[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """Without a gather or a conversion, tensors could still be the model's own memory."""
    own = parameter.untyped_storage().data_ptr()
    return {
        name: tensor.clone() if tensor.untyped_storage().data_ptr() == own else tensor
        for name, tensor in full.items()
    }


def _to_first_stage(
    rule: Placed,
    full: dict[str, Tensor],
    state: ParallelState,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Move a later stage's tensors to global rank 0; the stages in between do nothing."""
    group = pipeline_group()
    if state.pp_rank == rule.stage:
        for name in rule.hf:
            dist.send(full[name].contiguous(), dst=dist.get_global_rank(group, 0), group=group)
        return {}
    if state.pp_rank > 0:
        return {}
    received = {}
    for name, shape in zip(rule.hf, rule.shapes, strict=True):
        received[name] = torch.empty(shape, dtype=dtype, device=state.device)
        source = dist.get_global_rank(group, rule.stage)
        dist.recv(received[name], src=source, group=group)
    return received


def save_hf(
    models: Sequence[Any],
    hf: HfModelConfig,
    folder: str | Path,
    state: ParallelState,
    source_folder: str | Path,
) -> None:
    """Write the model as a Hugging Face folder; config and tokenizer come from `source_folder`.

    Collective: every rank calls and returns once the folder is in place. Only rank 0 writes: into
    `FOLDER.tmp`, flushed to disk, then renamed; an older `folder` is replaced.
    """
    target = Path(folder)
    tensors = iter_hf_tensors(models, hf, state)
    if not state.is_logging_rank:
        for _ in tensors:
            raise AssertionError("only global rank 0 receives tensors")
        dist.barrier()
        return
    dtype = unwrap(models[0]).config.params_dtype
    write_hf_folder(target, tensors, hf, dtype, source_folder)
    dist.barrier()


def write_hf_folder(
    folder: Path,
    tensors: Iterator[tuple[str, Tensor]],
    hf: HfModelConfig,
    dtype: torch.dtype,
    source_folder: str | Path,
) -> None:
    """Write all of `tensors` (in export order) as a complete folder that replaces an older one.

    Raises:
        OSError: the disk refused something; `folder` is as before.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_tensors(temporary, hf_shapes(hf), dtype, tensors, max_file_bytes=_SHARD_BYTES)
    for file in sorted(Path(source_folder).iterdir()):
        is_weights = ".safetensors" in file.suffixes or file.suffix in (".bin", ".pt", ".pth")
        if file.is_file() and not is_weights:
            shutil.copyfile(file, temporary / file.name)
    replace_folder(temporary, folder)
