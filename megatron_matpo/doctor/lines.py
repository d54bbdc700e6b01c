"""What a check says, and what it is told. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_matpo.config import Config

Status = Literal["pass", "warn", "fail", "skipped"]
Mode = Literal["full", "preflight", "build"]


@dataclass(frozen=True)
class Line:
    """One line of the report."""

    name: str
    """Of the check, as `gpu.driver`."""
    status: Status
    seen: str
    fix: str = ""
    """What to do; empty where nothing is to be done."""
    node: str = ""
    """Which node this is about, as `3 (host)`; empty on a single node, and for all together."""

    @property
    def node_index(self) -> int:
        """Of `node`; -1 for none."""
        return int(self.node.partition(" ")[0]) if self.node else -1


@dataclass(frozen=True)
class Site:
    """Where the doctor looks, and for what."""

    config: Config
    mode: Mode = "full"
    problems: tuple[str, ...] = ()
    """Keys and types of the recipe that are wrong."""
    recipe: str = ""
    """Empty: no recipe was named, and what a recipe would name is not looked at."""
    num_nodes: int = 1
    """Nodes of the allocation."""
    root: Path = field(default=Path("/"))
    """Where `sys`, `dev` and `proc` are."""

    @property
    def wants_gpus(self) -> bool:
        """Whether the run trains on GPUs."""
        return self.config.cluster.gpus_per_node > 0

    @property
    def disk_test_bytes(self) -> int:
        """Of the file that measures the disk."""
        mib = self.config.doctor.disk_test_mib
        return (min(mib, 16) if self.mode == "preflight" else mib) * 2**20


@dataclass(frozen=True)
class Check:
    """One entry of the catalogue; `docs/doctor.md` has a row for each."""

    name: str
    looks_at: str
    """What it looks at, and when that is a warning or a failure."""
    fix: str
    """What to do then, in general; a line of the check may say it more exactly."""
    run: Callable[[Site], list[Line]]
    in_preflight: bool = True
    in_build: bool = False

    def is_part_of(self, mode: Mode) -> bool:
        """Whether `mode` has it."""
        return mode == "full" or (self.in_preflight if mode == "preflight" else self.in_build)
