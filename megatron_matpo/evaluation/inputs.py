"""`RUN/eval/inputs.json`: what an evaluation is about, so that a resumed one is the same.

Paths say too little: a folder can hold other weights than before, a data set other rows. So
contents are compared: every text of every row, and samples of every weight file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_matpo.data.dataset import Question
from megatron_matpo.errors import ConfigError
from megatron_matpo.obs.files import write_atomic

FOLDER = "eval"
"""Of the run; holds this file, a folder for each set, and the report."""
_FILE = "inputs.json"
_MODEL_FILES = ("*.safetensors", "config.json", "tokenizer*.json", "chat_template.jinja")
# Training changes nearly every block of a weight file; hashing 30 GB would take a minute.
_BLOCK_BYTES = 64 * 1024
_MAX_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class Inputs:
    """Fingerprints of everything that an evaluation reads."""

    model: str
    sets: dict[str, str]
    """By the name of the set."""
    has_mixed_settings: bool = False
    """Results of other settings, model or rows may be among them (`--accept-changes`)."""


def results_path(run_dir: Path, name: str) -> Path:
    """Results of the set called `name`."""
    return run_dir / FOLDER / name / "results.jsonl"


def has_results(run_dir: Path) -> bool:
    """An evaluation has already put results into the folder."""
    return any((run_dir / FOLDER).glob("*/results.jsonl"))


def row_hash(question: Question) -> str:
    """Equal for rows that ask the same and expect the same answer."""
    texts = (question.system, question.user, question.ground_truth, question.data_source)
    return _hash(text.encode(errors="surrogatepass") for text in texts)


def set_fingerprint(questions: Sequence[Question]) -> str:
    """Changes with any row and with their order."""
    return _hash(row_hash(question).encode() for question in questions)


def model_fingerprint(folder: Path) -> str:
    """Changes with names, sizes and contents of the files that decide what the model samples.

    Of large files, 64 blocks of 64 KiB are read, evenly spread and with both ends.
    """
    files = sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern)})
    return _hash(part for file in files for part in _file_parts(file))


def read_inputs(run_dir: Path) -> Inputs | None:
    """What was evaluated in the folder before; None: nothing, or it cannot be read."""
    try:
        return Inputs(**json.loads((run_dir / FOLDER / _FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_inputs(run_dir: Path, inputs: Inputs) -> None:
    """Keep `inputs` for the next start."""
    write_atomic(run_dir / FOLDER / _FILE, json.dumps(asdict(inputs), indent=2) + "\n")


def merge_inputs(before: Inputs | None, now: Inputs, name: str, *, accept_changes: bool) -> Inputs:
    """`now`, with sets of earlier starts that this one leaves out.

    Args:
        before: what the folder's results belong to; None if it has none.
        now: what is to be evaluated.
        name: `run.name`, for the message.
        accept_changes: keep the results although their inputs differ. Those of changed rows are
            still dropped, because rows are compared one by one.

    Raises:
        ConfigError: the model or a set has changed.
    """
    if before is None:
        return now
    changed = [
        f"  eval.sets: {item} has other rows than before"
        for item, found in now.sets.items()
        if before.sets.get(item, found) != found
    ]
    if before.model != now.model:
        changed.insert(0, "  model.path: the folder holds another model than before")
    if changed and not accept_changes:
        raise ConfigError(
            f"run.name={name}: its folder holds results of something else; choose another "
            "run.name, or continue with --accept-changes:\n" + "\n".join(changed)
        )
    sets: Mapping[str, str] = {**before.sets, **now.sets}
    return Inputs(now.model, dict(sets), before.has_mixed_settings or bool(changed))


def _file_parts(file: Path) -> Iterable[bytes]:
    size = file.stat().st_size
    yield f"{file.name} {size}".encode()
    last = max(0, size - _BLOCK_BYTES)
    num_blocks = min(_MAX_BLOCKS, -(-size // _BLOCK_BYTES))
    with file.open("rb") as stream:
        for index in range(num_blocks):
            stream.seek(index * last // max(1, num_blocks - 1))
            yield stream.read(_BLOCK_BYTES)


def _hash(parts: Iterable[bytes]) -> str:
    """Of the sequence of parts: where one ends counts too."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
