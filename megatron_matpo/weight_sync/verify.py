"""Whether every engine holds what the trainer sent: version, and checksums of the weights.

The expected checksums are made from the export on its way to the transport, so nothing is exported
twice and no copy of the weights is kept. What an engine says comes from its own checker.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from megatron_matpo.errors import WeightSyncError
from megatron_matpo.types import PolicyVersion
from megatron_matpo.weight_sync.checksums import device_checksum, host_checksum
from megatron_matpo.weight_sync.engines import EngineControl, Engines
from megatron_matpo.weight_sync.layout import EngineLayout, EngineShape

SAMPLE_PUSHES = 8
"""With `sample`, this many pushes in a row compare every parameter once."""
_HINT = "; engines that rearrange weights need weight_sync.verify=version"
_log = logging.getLogger(__name__)


class Verifier:
    """`weight_sync.verify`: `full`, `sample` or `version`. First weights are compared whole."""

    def __init__(self, mode: str, shape: EngineShape, *, on_gpu: bool) -> None:
        """Engines of `shape`; `on_gpu` tells which checksum theirs is."""
        self._mode = mode
        self._shape = shape
        self._checksum = device_checksum if on_gpu else host_checksum
        self._expected: dict[str, list[str]] = {}
        self._num_pushes = 0
        self._is_first = False

    @property
    def expected(self) -> dict[str, list[str]]:
        """Per parameter of the engine, the checksum of each of its ranks; of the present push."""
        return self._expected

    def expect(self, others: dict[str, list[str]]) -> None:
        """Also compare what another rank sends."""
        self._expected |= others

    def compare_all(self) -> None:
        """Of the next push: an engine gets its first weights. All ranks that send call."""
        self._is_first = True

    def watch(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass the tensors of a push on, and note the checksums that engines must report."""
        self._expected = {}
        self._num_pushes += 1
        is_whole = self._mode == "full" or self._is_first or self._num_pushes == 1
        self._is_first = False
        if self._mode == "version":
            yield from tensors
            return
        layout = EngineLayout(self._shape)
        for name, tensor in tensors:
            yield name, tensor
            for engine_name, parts in layout.take(name, tensor):
                if is_whole or self._is_due(engine_name):
                    self._expected[engine_name] = [self._checksum(part) for part in parts]

    def _is_due(self, engine_name: str) -> bool:
        place = (zlib.crc32(engine_name.encode()) + self._num_pushes) % SAMPLE_PUSHES
        return place == 0

    async def check(self, version: PolicyVersion, engines: Engines) -> None:
        """Compare what every engine reports.

        Raises:
            WeightSyncError: an engine did not answer in time, reports another version, or holds
                another tensor; names engine and parameter.
        """
        versions = await engines.all(
            "reading versions", lambda e: e.weight_version(deadline_s=engines.request_s)
        )
        for engine, reported in versions.items():
            if reported != str(version):
                raise WeightSyncError(
                    f"engine {engine.url} reports weight version {reported!r} after version "
                    f"{version} was pushed"
                )
        if self._mode != "version":
            held = await engines.all(
                "reading checksums", lambda e: e.weight_checksums(deadline_s=engines.request_s)
            )
            self._compare(held)

    def _compare(self, held: Mapping[EngineControl, list[dict[str, str]]]) -> None:
        (first, of_first), *_ = held.items()
        for engine, ranks in held.items():
            if len(ranks) != self._shape.num_ranks:
                raise WeightSyncError(
                    f"engine {engine.url} has {len(ranks)} tensor-parallel ranks, rollout.tensor="
                    f"{self._shape.num_ranks}"
                )
            for rank, checksums in enumerate(ranks):
                for name, expected in self._expected.items():
                    if checksums.get(name) != expected[rank]:
                        raise WeightSyncError(
                            f"engine {engine.url}, rank {rank}: {name} has checksum "
                            f"{checksums.get(name)}, the trainer sent {expected[rank]}{_HINT}"
                        )
                # Also what has no expected checksum: engines at least hold the same.
                if checksums != of_first[rank]:
                    names = sorted(set(checksums.items()) ^ set(of_first[rank].items()))
                    raise WeightSyncError(
                        f"engines {first.url} and {engine.url} hold different weights: "
                        f"{names[0][0]}, rank {rank}"
                    )
        if self._num_pushes == 1:
            unknown = sorted(set(of_first[0]) - set(self._expected))
            _log.info(
                "checksums of %d parameters compared with the trainer's, of %d only between "
                "engines (%s)",
                len(self._expected),
                len(unknown),
                ", ".join(unknown[:3]),
            )
