"""What a checkpoint holds, and taking it over: model, optimizer, random state, progress, config.

Which folder, and when it is complete: `checkpoint_files`. How it is written: `checkpoint_writer`.

Resuming in the same layout continues bit for bit. Any other (TP, PP, CP, DP) can load parameters
and optimizer state too; random states then start from the seed.
"""

from __future__ import annotations

import json
import logging
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megatron_matpo import checkpoint_files as files
from megatron_matpo.config import Config, dump_config
from megatron_matpo.errors import CheckpointError
from megatron_matpo.megatron import optimizer_state
from megatron_matpo.megatron.checkpoint_writer import CheckpointWriter
from megatron_matpo.megatron.control import ControlGroup
from megatron_matpo.megatron.lora import settings_of
from megatron_matpo.megatron.model import unwrap
from megatron_matpo.megatron.parallel import ParallelState

_log = logging.getLogger(__name__)


class Checkpoints:
    """Saves and restores this rank's model and optimizer. Every method is collective."""

    def __init__(
        self,
        config: Config,
        models: Sequence[Any],
        optimizer: MegatronOptimizer,
        state: ParallelState,
    ) -> None:
        """Form a group for the ranks to agree in.

        Args:
            config: of the run; saved in every checkpoint.
            models: DDP-wrapped chunks of this rank.
            optimizer: this rank's optimizer.
            state: this rank's position.
        """
        self._config, self._models, self._optimizer = config, models, optimizer
        self._state = state
        self._control = ControlGroup(config.checkpoint.timeout_s, "checkpoint.timeout_s")
        self._writer = CheckpointWriter(config.checkpoint, self._control)
        self.restored: Path | None = None
        """The checkpoint that `restore` took over."""

    def save(
        self,
        folder: str | Path,
        step: int,
        extra: dict[str, Any],
        further: Mapping[str, bytes] | None = None,
    ) -> None:
        """Copy the state to host memory and begin to write checkpoint `step`.

        With `checkpoint.asynchronous` the files are written while the training goes on, and `poll`
        or `wait` complete the checkpoint; else this returns once `latest` names it.

        Args:
            folder: shared by all ranks; made if missing.
            step: names the checkpoint; an older one of the same step is replaced.
            extra: anything that JSON can hold (data position, counters); rank 0's is kept.
            further: further files of the checkpoint, by name; rank 0's are kept.

        Raises:
            CheckpointError: on every rank, if this or the previous checkpoint cannot be written,
                unless `checkpoint.on_failure` is `warn`. The last complete one is untouched.
            DeadlineError: a wait took longer than `checkpoint.timeout_s`.
        """
        record = {"layout": self._layout(), "model": self._identity(), "extra": extra}
        self._writer.save(
            Path(folder),
            step,
            self._sharded_state(is_loading=False),
            self._live_storages(),
            {
                files.RECORD: json.dumps(record).encode(),
                files.CONFIG: dump_config(self._config).encode(),
                **(further or {}),
            },
        )

    def poll(self) -> None:
        """See `CheckpointWriter.poll`."""
        self._writer.poll()

    def wait(self) -> None:
        """See `CheckpointWriter.wait`."""
        self._writer.wait()

    def restore(self, folder: str | Path) -> dict[str, Any] | None:
        """Take over the checkpoint that `checkpoint.load` names.

        Returns:
            The `extra` that was saved, on every rank; None, with nothing changed, if there is no
            checkpoint.

        Raises:
            CheckpointError: on every rank, if files are missing, cut short or damaged (naming the
                newest older checkpoint that is whole), or the checkpoint belongs to another model.
        """
        path = self._choose(Path(folder))
        if path is None:
            return None
        saved = self._control.on_first(lambda: files.read_record(path), f"cannot load {path}")
        own = self._identity()
        if saved["model"] != own:
            raise CheckpointError(
                f"{path} is of another model: {saved['model']}, this one is {own}"
            )
        same_layout = saved["layout"] == self._layout()
        request = self._sharded_state(is_loading=True)
        if not same_layout:
            del request["rng"]
        try:
            loaded: Any = dist_checkpointing.load(request, str(path))
        except (CheckpointingException, CheckpointException) as error:
            raise CheckpointError(f"{path} cannot be loaded: {error}") from error
        # Loading fills the request in place, so the description of the model is asked for again.
        chunks = [unwrap(model) for model in self._models]
        states = [chunk.sharded_state_dict() for chunk in chunks]
        optimizer_state.restore(chunks, self._optimizer, states, loaded["optimizer"])
        for i, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded["model"][str(i)])
        if same_layout:
            _set_rng_state(loaded["rng"])
        self.restored = path
        return saved["extra"]

    def _choose(self, root: Path) -> Path | None:
        """The checkpoint to load, verified; None if there is nothing to resume.

        Raises:
            CheckpointError: it is damaged, and `checkpoint.load` is not `whole`.
        """
        which = self._config.checkpoint.load
        choices: list[Path] = self._control.on_first(
            lambda: files.candidates(root, which), f"cannot read {root}"
        )
        rejected: list[str] = []
        for path in choices:
            found = self._problems(path)
            if not found and (not rejected or which == files.WHOLE):
                for text in rejected if self._state.is_logging_rank else ():
                    _log.warning("checkpoint.load=whole: passed over a checkpoint: %s", text)
                return path
            if not found:
                raise CheckpointError(
                    f"{rejected[0]}; the newest whole checkpoint before it is {path.name}: resume "
                    f"there with checkpoint.load={path.name}, or always from the newest whole one "
                    f"with checkpoint.load={files.WHOLE}"
                )
            rejected.append(found[0] + (f" (and {len(found) - 1} more)" if found[1:] else ""))
        if rejected:
            raise CheckpointError(f"{rejected[0]}; there is no older checkpoint that is whole")
        return None

    def _problems(self, path: Path) -> list[str]:
        """What is wrong with a checkpoint; every rank reads a share of its files."""
        try:
            entries = self._control.on_first(
                lambda: files.read_manifest(path), f"cannot load {path}"
            )
        except CheckpointError as error:
            return [str(error)]
        mine = dict(list(entries.items())[self._state.rank :: self._state.world_size])
        full = self._config.checkpoint.verify == "full"
        try:
            own = list(files.problems(path, mine, full=full))
        except OSError as error:
            own = [f"{path}: {error}"]
        return [text for texts in self._control.share(own) for text in texts]

    def _layout(self) -> dict[str, int]:
        """What random states belong to."""
        state = self._state
        return {
            "tensor": state.tp_size,
            "pipeline": state.pp_size,
            "virtual": state.vp_size,
            "context": state.cp_size,
            "expert": state.ep_size,
            "data": state.dp_size,
        }

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to fit; the same for every layout."""
        model = unwrap(self._models[0])
        config = model.config
        return {
            "layers": config.num_layers,
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_query_groups or config.num_attention_heads,
            "head_dim": config.kv_channels or 0,
            "ffn": config.ffn_hidden_size or 0,
            "qkv_bias": int(config.add_qkv_bias),
            "qk_norm": int(config.qk_layernorm),
            "experts": config.num_moe_experts or 0,
            "expert_ffn": config.moe_ffn_hidden_size or 0,
            "tied_embeddings": int(model.share_embeddings_and_output_weights),
            **settings_of(model),
        }

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """This rank's part of everything, described so that other ranks' parts complete it."""
        state = self._state
        with warnings.catch_warnings():
            # Megatron's own use of deprecated torch calls; one line per tensor otherwise.
            warnings.simplefilter("ignore")
            chunks = [unwrap(model) for model in self._models]
            models = [chunk.sharded_state_dict() for chunk in chunks]
            described = optimizer_state.describe(chunks, self._optimizer, models, state, is_loading)
            return {
                "model": {str(i): model for i, model in enumerate(models)},
                "optimizer": described,
                "rng": ShardedObject("rng", _rng_state(), (state.world_size,), (state.rank,)),
            }

    def _live_storages(self) -> set[int]:
        """Host memory of the model, which a background write must not read from."""
        tensors = [t for model in self._models for t in unwrap(model).state_dict().values()]
        return {
            t.untyped_storage().data_ptr()
            for t in tensors
            if isinstance(t, torch.Tensor) and t.is_cpu
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
