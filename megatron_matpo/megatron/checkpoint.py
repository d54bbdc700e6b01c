"""Checkpoints of model, optimizer and random state, whole or absent.

    FOLDER/step_12/       what `latest` names; manifest.json lists its files and their sizes
    FOLDER/step_16.tmp/   being written, or left behind by a run that was killed
    FOLDER/latest         text: step_12

Order of a save: write into `step_N.tmp`, flush to disk, rename to `step_N`, replace `latest`, and
only then delete what is older than `keep_last`. So at every moment `latest` names a complete
checkpoint, whichever rank is killed when.

Resuming in the same layout continues bit for bit. Another layout (TP, PP, DP) can load parameters
and optimizer state too; random states then start from the seed.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from megatron_matpo.errors import CheckpointError
from megatron_matpo.megatron import optimizer_state
from megatron_matpo.megatron.hf_io import flush_to_disk, replace_folder
from megatron_matpo.megatron.lora import settings_of
from megatron_matpo.megatron.model import unwrap
from megatron_matpo.megatron.parallel import ParallelState

_LATEST = "latest"
_MANIFEST = "manifest.json"
_EXTRA = "extra.json"
_STEP = re.compile(r"step_(\d+)")


class _InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron's format, written by this process.

    Megatron's own writer starts a `spawn` process, which imports the program's main module again,
    and forks another for each file, which is not safe beside gloo's threads and has no deadline.
    torch's writer needs neither, and reports one rank's failure on all ranks.
    """

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Collective; returns when every rank's file and the metadata are on disk."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        dcp_save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=FileSystemWriter(checkpoint_dir, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_checkpoint(
    folder: str | Path,
    step: int,
    models: Sequence[Any],
    optimizer: MegatronOptimizer,
    extra: dict[str, Any],
    state: ParallelState,
    keep_last: int,
) -> None:
    """Write checkpoint `step`. Collective; returns on every rank once `latest` names it.

    Args:
        folder: shared by all ranks; made if missing.
        step: names the checkpoint; an older one of the same step is replaced.
        models: DDP-wrapped chunks of this rank.
        optimizer: this rank's optimizer.
        extra: anything that JSON can hold (data position, counters); rank 0's is kept.
        state: this rank's position.
        keep_last: complete checkpoints to keep, this one included; at least 1.

    Raises:
        CheckpointError: on every rank, if the files could not be written. The previous checkpoint
            is untouched.
    """
    root = Path(folder)
    target = root / f"step_{step}"
    temporary = root / f"step_{step}.tmp"
    _on_rank_0(state, lambda: _prepare(temporary), f"cannot prepare {temporary}")
    problem = ""
    try:
        dist_checkpointing.save(
            _sharded_state(models, optimizer, state, is_loading=False),
            str(temporary),
            sharded_strategy=_InProcessSave("torch_dist", 1),
        )
    except (OSError, CheckpointException) as error:
        problem = str(error)
    problems: list[str] = [""] * state.world_size
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise CheckpointError(f"checkpoint {target} was not written: {'; '.join(problems)}")
    record = {"layout": _layout(state), "model": _identity(models), "extra": extra}
    _on_rank_0(
        state,
        lambda: _commit(root, temporary, target, record),
        f"checkpoint {target} was not completed",
    )
    _on_rank_0(state, lambda: _prune(root, max(1, keep_last), step), f"cannot prune {root}")


def load_checkpoint(
    folder: str | Path,
    models: Sequence[Any],
    optimizer: MegatronOptimizer,
    state: ParallelState,
) -> dict[str, Any] | None:
    """Take over the checkpoint that `FOLDER/latest` names. Collective.

    Returns:
        The `extra` that was saved, on every rank; None, with nothing changed, if there is no
        checkpoint.

    Raises:
        CheckpointError: on every rank, if files are missing or cut short, or the checkpoint
            belongs to another model.
    """
    found = _on_rank_0(state, lambda: _find(Path(folder)), f"cannot read {folder}")
    if found is None:
        return None
    path, saved = found
    own = _identity(models)
    if saved["model"] != own:
        raise CheckpointError(f"{path} is of another model: {saved['model']}, this one is {own}")
    same_layout = saved["layout"] == _layout(state)
    request = _sharded_state(models, optimizer, state, is_loading=True)
    if not same_layout:
        del request["rng"]
    try:
        loaded: Any = dist_checkpointing.load(request, path)
    except (CheckpointingException, CheckpointException) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    # Loading fills the request in place, so the description of the model is asked for again.
    model = unwrap(models[0])
    optimizer_state.restore(model, optimizer, model.sharded_state_dict(), loaded["optimizer"])
    model.load_state_dict(loaded["model"])
    if same_layout:
        _set_rng_state(loaded["rng"])
    return saved["extra"]


def _on_rank_0(state: ParallelState, action: Callable[[], Any], what: str) -> Any:
    """Run `action` on rank 0; its result, or its failure as CheckpointError, on every rank."""
    outcome: list[Any] = [None, ""]
    if state.is_logging_rank:
        try:
            outcome[0] = action()
        except (OSError, ValueError, CheckpointError) as error:
            outcome[1] = f"{what}: {error}"
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1]:
        raise CheckpointError(outcome[1])
    return outcome[0]


def _layout(state: ParallelState) -> dict[str, int]:
    """What random states belong to."""
    return {"tensor": state.tp_size, "pipeline": state.pp_size, "data": state.dp_size}


def _identity(models: Sequence[Any]) -> dict[str, Any]:
    """What must be equal for a checkpoint to fit; the same for every layout."""
    model = unwrap(models[0])
    config = model.config
    return {
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_query_groups or config.num_attention_heads,
        "head_dim": config.kv_channels or 0,
        "ffn": config.ffn_hidden_size or 0,
        "tied_embeddings": int(model.share_embeddings_and_output_weights),
        **settings_of(model),
    }


def _sharded_state(
    models: Sequence[Any], optimizer: MegatronOptimizer, state: ParallelState, is_loading: bool
) -> dict[str, Any]:
    """This rank's part of everything, described so that other ranks' parts complete it."""
    with warnings.catch_warnings():
        # Megatron's own use of deprecated torch calls; one line per tensor otherwise.
        warnings.simplefilter("ignore")
        chunk = unwrap(models[0])
        model = chunk.sharded_state_dict()
        return {
            "model": model,
            "optimizer": optimizer_state.describe(chunk, optimizer, model, state, is_loading),
            "rng": ShardedObject("rng", _rng_state(), (state.world_size,), (state.rank,)),
        }


def _tracker() -> Any:
    """Megatron's table of random states."""
    return get_cuda_rng_tracker()


def _rng_state() -> dict[str, Any]:
    """Every generator that this process draws from."""
    result = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "tracker": _tracker().get_states(),
    }
    if torch.cuda.is_initialized():
        result["cuda"] = torch.cuda.get_rng_state()
    return result


def _set_rng_state(saved: dict[str, Any]) -> None:
    """The inverse of `_rng_state`."""
    random.setstate(saved["python"])
    _tracker().set_states(saved["tracker"])
    torch.set_rng_state(saved["torch"])
    if "cuda" in saved and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(saved["cuda"])


def _prepare(temporary: Path) -> None:
    """An empty folder, whatever a killed run left there."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _commit(root: Path, temporary: Path, target: Path, record: dict[str, Any]) -> None:
    """Make a written folder the latest checkpoint."""
    (temporary / _EXTRA).write_text(json.dumps(record), encoding="utf-8")
    sizes = {str(p.relative_to(temporary)): p.stat().st_size for p in _files(temporary)}
    (temporary / _MANIFEST).write_text(json.dumps(sizes, indent=2), encoding="utf-8")
    replace_folder(temporary, target)
    pointer = root / (_LATEST + ".tmp")
    pointer.write_text(target.name + "\n", encoding="utf-8")
    flush_to_disk(pointer)
    os.replace(pointer, root / _LATEST)
    flush_to_disk(root / _LATEST)


def _files(folder: Path) -> list[Path]:
    """All files below `folder`."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _prune(root: Path, keep_last: int, newest: int) -> None:
    """Delete complete checkpoints beyond `keep_last`, and what killed runs left behind."""
    steps = {}
    for path in root.iterdir():
        match = _STEP.match(path.name)
        if match and path.name != match.group(0):
            shutil.rmtree(path)
        elif match:
            steps[int(match.group(1))] = path
    # A run that went back to an older step must not have the newest pruned in favour of those
    # that it is about to replace.
    older = sorted((step for step in steps if step != newest), reverse=True)
    for step in older[keep_last - 1 :]:
        shutil.rmtree(steps[step])


def _find(root: Path) -> tuple[str, dict[str, Any]] | None:
    """Path and record of the latest checkpoint, after checking that all its files are there."""
    pointer = root / _LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    path = root / name
    if not path.is_dir():
        # A save of the same step was killed between its two renames.
        path = root / f"{name}.old"
    if not path.is_dir():
        raise CheckpointError(f"{pointer} names {name!r}, which is not there")
    if not (path / _MANIFEST).is_file():
        raise CheckpointError(f"{path} has no {_MANIFEST}; it is incomplete")
    sizes = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    for file, size in sizes.items():
        actual = (path / file).stat().st_size if (path / file).is_file() else None
        if actual != size:
            found = "missing" if actual is None else f"{actual} bytes"
            raise CheckpointError(f"{path / file}: expected {size} bytes, found {found}")
    return str(path), json.loads((path / _EXTRA).read_text(encoding="utf-8"))
