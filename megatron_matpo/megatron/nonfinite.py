"""An update whose loss or gradient is not finite: whose fault it is, and its batch on disk.

Invariants:

* what is named is the same on every rank;
* a dump is complete or absent: written beside its final name and renamed;
* nothing here costs an update that goes well more than two floats per token.

    from megatron_matpo.megatron.nonfinite import read_dump
    dump = read_dump("runs/NAME/nonfinite/step_000012/update_0")
    dump.about["culprits"]           # {trajectory: what of it is not finite}
    dump.replicas[1][0].batch        # first micro-batch of the second replica, as the loss saw it

`python -m megatron_matpo.megatron.nonfinite FOLDER` prints a summary.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_matpo.errors import NonFiniteError
from megatron_matpo.megatron.batch import MicroBatch
from megatron_matpo.megatron.parallel import ParallelState
from megatron_matpo.megatron.schedule import LossFn

_log = logging.getLogger(__name__)

ABOUT = "about.json"
_NAMED_IN_TEXT = 5

Culprits = dict[str, tuple[str, ...]]
"""Trajectory id -> what of it is not finite: fields of `MicroBatch`, `logprobs`, `gradient` (of the
loss by its log-probs), `weight_gradient` (of the weights, by the micro-batch that it is in)."""


@dataclass
class Seen:
    """One micro-batch as the loss saw it."""

    batch: MicroBatch
    logprobs: Tensor
    """Like `batch.labels`, float32: of the model that was to be updated."""
    gradient: Tensor | None = None
    """Of the loss by `logprobs`; None before the backward pass came there."""

    def culprits(self) -> Culprits:
        """Trajectories of this micro-batch with values that are not finite."""
        values: dict[str, Any] = {"logprobs": self.logprobs, "gradient": self.gradient}
        values |= {
            item.name: getattr(self.batch, item.name) for item in dataclasses.fields(self.batch)
        }
        found: dict[str, list[str]] = {}
        for name, value in values.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                for sample in _samples_with(~torch.isfinite(value), self.batch):
                    found.setdefault(sample, []).append(name)
        return {sample: tuple(names) for sample, names in found.items()}


def _samples_with(marks: Tensor, batch: MicroBatch) -> list[str]:
    """Ids of the samples that have a mark; padding micro-batches have none."""
    assert batch.sample_index is not None, "placed batches know whose their tokens are"
    marked = batch.sample_index[marks].unique().tolist()
    return [batch.sample_ids[i] for i in marked if 0 <= i < len(batch.sample_ids)]


class Watch:
    """A `LossFn` around another one that keeps what each micro-batch looked like."""

    def __init__(self, loss_fn: LossFn) -> None:
        """Of one update."""
        self._loss_fn = loss_fn
        self.seen: list[Seen] = []

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, batch: MicroBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As the loss function."""
        seen = Seen(batch, logprobs.detach())
        self.seen.append(seen)
        if logprobs.requires_grad:
            logprobs.register_hook(lambda gradient: setattr(seen, "gradient", gradient.detach()))
        return self._loss_fn(logprobs, entropy, batch)


class UpdateRefused(NonFiniteError):
    """`NonFiniteError` of an update, with what is needed to look into it."""

    def __init__(self, reason: str, culprits: Culprits, seen: Sequence[Seen]) -> None:
        """`seen` is this rank's (off the last stage nothing), the rest is equal on all ranks."""
        super().__init__(f"{reason}; nothing was changed; {_named(culprits)}")
        self.reason, self.culprits, self.seen = reason, culprits, seen


def _named(culprits: Mapping[str, Sequence[str]]) -> str:
    if not culprits:
        return "no single trajectory has values that are not finite"
    named = [f"{name} ({', '.join(what)})" for name, what in culprits.items()]
    more = len(named) - _NAMED_IN_TEXT
    rest = f" and {more} more" if more > 0 else ""
    return f"not finite in trajectory {', '.join(named[:_NAMED_IN_TEXT])}{rest}"


def gather_culprits(mine: Sequence[Culprits]) -> Culprits:
    """All ranks' findings, in the order of trajectory ids. Every trainer rank calls."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, list(mine))
    merged: dict[str, set[str]] = {}
    for found in (item for of_rank in everyone for item in of_rank):
        for sample, what in found.items():
            merged.setdefault(sample, set()).update(what)
    return {sample: tuple(sorted(merged[sample])) for sample in sorted(merged)}


def write_dump(
    folder: Path, refused: UpdateRefused, about: Mapping[str, Any], state: ParallelState
) -> bool:
    """Write the update's batch under `folder`, which all ranks must see. Every trainer rank calls.

    One file per data-parallel replica and context-parallel rank (which has its own tokens), from
    the last stage's first tensor-parallel rank. A disk that refuses is a warning: the update's own
    error is the one to report.

    Returns:
        Whether the dump is there; the same on every rank.
    """
    building = folder.with_name(folder.name + ".incomplete")
    if state.rank == 0:
        shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
    dist.barrier()
    problem = ""
    try:
        building.mkdir(parents=True, exist_ok=True)
        if state.is_last_stage and state.tp_rank == 0:
            number = state.dp_rank * state.cp_size + state.cp_rank
            _write_replica(building / f"replica_{number}.safetensors", refused.seen)
        if state.rank == 0:
            text = {**about, "reason": refused.reason, "culprits": refused.culprits}
            (building / ABOUT).write_text(json.dumps(text, indent=1) + "\n")
    except OSError as error:
        problem = f"rank {state.rank}: {error}"
    problems: list[Any] = [None] * state.world_size
    dist.all_gather_object(problems, problem)
    failed = [text for text in problems if text]
    if state.rank == 0 and not failed:
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of the same update before a resume
            os.replace(building, folder)
        except OSError as error:
            failed = [str(error)]
    outcome: list[Any] = [failed]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] and state.rank == 0:
        _log.warning("the batch of the refused update was not written: %s", outcome[0][0])
    return not outcome[0]


def _write_replica(path: Path, seen: Sequence[Seen]) -> None:
    tensors: dict[str, Tensor] = {}
    others: list[dict[str, Any]] = []
    for index, item in enumerate(seen):
        values: dict[str, Any] = {
            f.name: getattr(item.batch, f.name) for f in dataclasses.fields(item.batch)
        }
        values |= {"/logprobs": item.logprobs, "/gradient": item.gradient}
        for name, value in values.items():
            if isinstance(value, Tensor):
                # Fields may share memory, which the format does not store.
                tensors[f"{index}/{name}"] = value.detach().cpu().clone().contiguous()
        others.append({k: v for k, v in values.items() if not isinstance(v, Tensor)})
    save_file(tensors, path, metadata={"others": json.dumps(others)})


@dataclass(frozen=True)
class Dump:
    """What `write_dump` wrote."""

    about: dict[str, Any]
    replicas: list[list[Seen]]
    """Micro-batches of each data-parallel replica (of each of its context-parallel ranks, one after
    the other), in the order of the update."""


def read_dump(folder: str | Path) -> Dump:
    """Load a dump; tensors are on the CPU, and as they were bit for bit."""
    files = sorted(Path(folder).glob("replica_*.safetensors"), key=lambda f: int(f.stem[8:]))
    return Dump(
        about=json.loads((Path(folder) / ABOUT).read_text()),
        replicas=[_read_replica(file) for file in files],
    )


def _read_replica(path: Path) -> list[Seen]:
    with safe_open(path, "pt") as file:
        others: list[dict[str, Any]] = json.loads(file.metadata()["others"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    result: list[Seen] = []
    for index, other in enumerate(others):
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in other.items()
        }
        prefix = f"{index}/"
        values |= {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        logprobs, gradient = values.pop("/logprobs"), values.pop("/gradient", None)
        result.append(Seen(MicroBatch(**values), logprobs, gradient))
    return result


def _summary(dump: Dump) -> str:
    lines = [f"{key}: {value}" for key, value in dump.about.items() if key != "culprits"]
    lines += [f"  {name}: {', '.join(what)}" for name, what in dump.about["culprits"].items()]
    for replica, batches in enumerate(dump.replicas):
        for index, item in enumerate(batches):
            shape = "x".join(map(str, item.batch.labels.shape))
            ids = ", ".join(item.batch.sample_ids) or "padding"
            lines.append(f"replica {replica}, micro-batch {index} [{shape}]: {ids}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(_summary(read_dump(sys.argv[1])))
