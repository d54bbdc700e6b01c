"""Sites for the doctor's checks, and stand-ins that are called fake: nvidia-smi and sysfs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_matpo.config import Config
from megatron_matpo.config.doctor import DoctorConfig
from megatron_matpo.config.run import ClusterConfig, RunConfig
from megatron_matpo.doctor.lines import Line, Site

A800 = "{index}, NVIDIA A800-SXM4-80GB, 8.0, 81920, {used}, {driver}"


def site_of(tmp_path: Path, *, gpus: int = 0, **changes: Any) -> Site:
    """A site whose run folder is below `tmp_path`; `changes` are fields of the site or config."""
    fields = {key: changes.pop(key) for key in ("mode", "num_nodes", "root") if key in changes}
    changes.setdefault("doctor", DoctorConfig(check_timeout_s=60.0, disk_test_mib=1))
    changes.setdefault("cluster", ClusterConfig(gpus_per_node=gpus))
    config = replace(Config(), run=RunConfig(dir=str(tmp_path / "runs")), **changes)
    return Site(config=config, **fields)


def only(lines: list[Line]) -> Line:
    """The one line of a check."""
    assert len(lines) == 1, lines
    return lines[0]


def fake_program(tmp_path: Path, monkeypatch: Any, name: str, script: str) -> Path:
    """A shell script on PATH in place of the real program."""
    folder = tmp_path / "fake_bin"
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n# Fake {name}.\n{script}\n")
    file.chmod(0o755)
    import os

    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return file


def fake_nvidia_smi(
    tmp_path: Path, monkeypatch: Any, *, count: int = 8, used: int = 3, driver: str = "580.95.05"
) -> None:
    """Answers the doctor's question with `count` A800."""
    rows = [A800.format(index=i, used=used, driver=driver) for i in range(count)]
    listing = "\n".join(rows)
    fake_program(tmp_path, monkeypatch, "nvidia-smi", f"cat <<'END'\n{listing}\nEND")


def fake_infiniband(root: Path, **ports: str) -> Path:
    """`root` with ports `mlx5_N` in the states given, 200 Gb/s each, as the kernel writes them."""
    for name, state in ports.items():
        folder = root / "sys/class/infiniband" / name / "ports/1"
        folder.mkdir(parents=True)
        (folder / "state").write_text(f"{state}\n")
        (folder / "rate").write_text("200 Gb/sec (4X HDR)\n")
        (folder / "link_layer").write_text("InfiniBand\n")
    (root / "dev/infiniband").mkdir(parents=True)
    (root / "dev/infiniband/uverbs0").touch()
    return root
