"""A checkpoint as a Hugging Face folder, in one process on the CPU.

`matpo export` runs this module as a process of its own: `launch` does not import torch. Tensors are
read from the checkpoint's files one at a time, so neither the run's layout nor its GPUs are needed,
and the memory of one tensor and one rank's part of it is enough. Adapters are merged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_matpo import checkpoint_files as files
from megatron_matpo.config.hf_model import HfModelConfig
from megatron_matpo.config.load import load_resolved
from megatron_matpo.config.lora import LoraConfig
from megatron_matpo.errors import CheckpointError, ConfigError, MatpoError
from megatron_matpo.megatron.checkpoint_reader import CheckpointReader
from megatron_matpo.megatron.lora import Adapted, adapted_linears, merge
from megatron_matpo.megatron.mapping import hf_shapes, hf_tensors, placed_rules
from megatron_matpo.megatron.safetensors_writer import INDEX, write_tensors
from megatron_matpo.obs.files import flush_to_disk, replace_folder

MAX_FILE_BYTES = 4 << 30
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.+\.experts\.)local_experts\.(\d+)\.(.+)")
_GROUPED_EXPERT = re.compile(r"(.+\.experts\.)(linear_fc\d\.(?:weight|bias))(\d+)")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
Place = tuple[str, tuple[int, ...]]
"""Key of a tensor in a checkpoint, and index along its leading axes."""
# Not the policy's own: state of the optimizer and of the modules, random states.
_NOT_WEIGHTS = ("optimizer.", "rng")


def export(
    checkpoint: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    source: Path | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> torch.dtype:
    """Write the policy of `checkpoint` to the Hugging Face folder `out`, and return its dtype.

    `out` is complete or absent: it is written as `OUT.tmp` and renamed; an older one is replaced.

    Args:
        checkpoint: a complete `step_N` folder.
        out: the folder to write.
        dtype: of the weights; None: as they were trained.
        source: where config.json and the tokenizer come from; None: `model.path` of the run.
        max_file_bytes: bound of a safetensors file.

    Raises:
        CheckpointError: the checkpoint is damaged, or not of the model of `source`.
        ConfigError: `source` is not a model folder.
        OSError: the disk refused something.
    """
    entries = files.read_manifest(checkpoint)
    problem = next(files.problems(checkpoint, entries, full=True), "")
    if problem:
        raise CheckpointError(problem)
    config = load_resolved(str(checkpoint / files.CONFIG))
    source = source or Path(config.model.path)
    hf = HfModelConfig.from_folder(source)
    reader = CheckpointReader(checkpoint)
    adapted = {item.rule.hf[0]: item for item in adapted_linears(hf, config.lora)}
    places = _places(hf, reader.shapes(), adapted)
    kept = reader.dtype(next(iter(places.values()))[0])
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_tensors(
            temporary,
            hf_shapes(hf),
            dtype or kept,
            _tensors(hf, reader, places, adapted, config.lora),
            max_file_bytes=max_file_bytes,
        )
        _copy_rest(source, temporary, dtype or kept)
        replace_folder(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return dtype or kept


def _tensors(
    hf: HfModelConfig,
    reader: CheckpointReader,
    places: Mapping[str, Place],
    adapted: Mapping[str, Adapted],
    lora: LoraConfig,
) -> Iterator[tuple[str, Tensor]]:
    """All tensors by Hugging Face name, in the order of `hf_shapes`."""
    for rule in placed_rules(hf):
        key, index = places[rule.hf[0]]
        # What all ranks hold together lies in a checkpoint as if one rank held it.
        whole = reader.read(key, index)
        if own := adapted.get(rule.hf[0]):
            a, b = (reader.read(_adapter_key(key, matrix), index) for matrix in "AB")
            whole = merge(whole, a, b, own.owner, lora.scale)
        yield from hf_tensors(rule, [whole], hf).items()


def _adapter_key(weight: str, matrix: str) -> str:
    """Where A or B of the adapter beside a weight lies in a checkpoint."""
    return f"{weight.removesuffix('weight')}lora.{matrix}"


def _places(
    hf: HfModelConfig, shapes: Mapping[str, tuple[int, ...]], adapted: Collection[str]
) -> dict[str, Place]:
    """Key and index of every rule's parameter, by the rule's first Hugging Face name.

    Raises:
        CheckpointError: a parameter is not in the checkpoint, or nothing asks for one that is.
    """
    places: dict[str, Place] = {}
    for rule in placed_rules(hf):
        found = [place for name in rule.megatron for place in _names(name) if place[0] in shapes]
        if not found:
            raise CheckpointError(
                f"the checkpoint has no {' or '.join(rule.megatron)}; is {hf.folder} the model "
                "that was trained?"
            )
        places[rule.hf[0]] = found[0]
    parts: dict[str, set[tuple[int, ...]]] = {}
    for name, (key, index) in places.items():
        parts.setdefault(key, set()).add(index)
        for matrix in "AB" if name in adapted else "":
            parts.setdefault(_adapter_key(key, matrix), set()).add(index)
    for key, shape in shapes.items():
        if key.startswith(_NOT_WEIGHTS):
            continue
        wanted = parts.get(key, set())
        axes = shape[: len(next(iter(wanted), ()))]
        if wanted != set(itertools.product(*(range(size) for size in axes))):
            raise CheckpointError(
                f"{key} {list(shape)} is in the checkpoint, but the model of {hf.folder} has "
                f"{len(wanted)} parts of it; is that the model that was trained?"
            )
    return places


def _names(parameter: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """How Megatron may call a parameter in a checkpoint: key, and index along leading axes.

    Layers of one kind are stacked along an axis, others keep their number in the key; experts are
    always stacked. Source: Megatron-Core 0.16.1, `transformer_block.py:805`, `experts.py:935`.
    """
    name, expert = parameter, ()
    if match := _EXPERT.fullmatch(parameter):
        name, expert = f"{match[1]}experts.{match[3]}", (int(match[2]),)
    elif match := _GROUPED_EXPERT.fullmatch(parameter):
        name, expert = f"{match[1]}experts.{match[2]}", (int(match[3]),)
    if match := _LAYER.fullmatch(name):
        yield f"decoder.layers.{match[2]}", (int(match[1]), *expert)
    yield name, expert


def _copy_rest(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Everything but weights; config.json names the dtype that was written."""
    for path in sorted(source.iterdir()):
        is_weights = path.name == INDEX or path.suffix in _WEIGHT_SUFFIXES
        if path.is_file() and not is_weights:
            shutil.copyfile(path, target / path.name)
    config: dict[str, Any] = json.loads((target / "config.json").read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    config["dtype"] = name
    if "torch_dtype" in config:  # what older releases of transformers write and read
        config["torch_dtype"] = name
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    flush_to_disk(target / "config.json")


def main() -> int:
    """Arguments of `matpo export`, resolved to folders."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=tuple(DTYPES))
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    try:
        dtype = export(
            options.checkpoint,
            options.out,
            dtype=DTYPES[options.dtype] if options.dtype else None,
            source=options.model,
        )
    except ConfigError as error:
        hint = "" if options.model else " (choose the model's folder with --model)"
        print(f"{error}{hint}", file=sys.stderr)
        return error.exit_code
    except (MatpoError, OSError) as error:
        print(f"{options.checkpoint} was not exported: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {options.checkpoint} in {str(dtype).removeprefix('torch.')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
