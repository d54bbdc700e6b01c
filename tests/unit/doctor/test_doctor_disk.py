"""Proves what the doctor says of disks, shared memory and limits: this machine's real ones.

What a machine cannot be made to be (full, slow) comes from settings and patched system calls.
"""

from __future__ import annotations

import json
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_matpo.config.doctor import DoctorConfig
from megatron_matpo.config.lora import LoraConfig
from megatron_matpo.config.rollout import RolloutConfig
from megatron_matpo.config.tools import CacheConfig, ToolsConfig
from megatron_matpo.config.train import ModelConfig
from megatron_matpo.doctor import disk
from megatron_matpo.doctor.disk import (
    check_file_system,
    check_open_files,
    check_shared_memory,
    check_space,
    check_speed,
    checkpoint_bytes,
    clock_line,
    file_system_of,
    standing,
)
from tests.helpers.doctor_site import only, site_of

Usage = namedtuple("Usage", "total used free")
MOUNTS = """\
overlay / overlay rw 0 0
server:/export /shared nfs4 rw 0 0
tmpfs /shared/scratch\\040space tmpfs rw 0 0
"""


@pytest.fixture
def model(tmp_path):
    """A model of 2 layers: 2 * (64 * (2 * 64 + 2 * 32) + 3 * 64 * 128 + 160) + 65600 parameters."""
    folder = tmp_path / "model"
    folder.mkdir()
    fields = {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "vocab_size": 512,
        "rope_theta": 10000.0,
        "max_position_embeddings": 40960,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return ModelConfig(path=str(folder))


NUM_PARAMETERS = 2 * (64 * (2 * 64 + 2 * 32) + 3 * 64 * 128 + 160) + 2 * 512 * 64 + 64


def test_a_checkpoint_is_weights_and_optimizer(tmp_path, model):
    site = site_of(tmp_path, model=model)
    assert checkpoint_bytes(site.config) == NUM_PARAMETERS * 12  # fp32 and two moments
    on_gpu = site_of(tmp_path, model=model, gpus=8)
    assert checkpoint_bytes(on_gpu.config) == NUM_PARAMETERS * 14  # bf16, fp32, two moments
    adapters = replace(on_gpu.config, lora=LoraConfig(rank=8))
    assert checkpoint_bytes(adapters) == NUM_PARAMETERS * 2
    assert checkpoint_bytes(site_of(tmp_path).config) == 0


@pytest.mark.parametrize(
    ("share", "status"), [(3.1, "pass"), (2.9, "warn"), (1.1, "warn"), (0.9, "fail")]
)
def test_room_is_compared_with_the_checkpoints_kept(tmp_path, monkeypatch, model, share, status):
    site = site_of(tmp_path, model=model)
    free = int(share * NUM_PARAMETERS * 12)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(2 * free, free, free))
    assert only(check_space(site)).status == status


def test_real_room_is_told_and_no_folder_is_made(tmp_path):
    line = only(check_space(site_of(tmp_path)))
    assert line.status == "pass"
    assert str(tmp_path) in line.seen
    assert standing(str(tmp_path / "a" / "b")) == tmp_path
    assert not (tmp_path / "runs").exists()


def test_the_disk_is_measured_and_left_as_it_was(tmp_path):
    before = sorted(tmp_path.iterdir())
    doctor = DoctorConfig(disk_test_mib=2, min_disk_mb_s=0.0)
    speed, clock = check_speed(site_of(tmp_path, doctor=doctor))
    assert (speed.status, "(2 MiB with fsync" in speed.seen) == ("pass", True)
    assert (clock.name, clock.status) == ("disk.clock", "pass")
    assert sorted(tmp_path.iterdir()) == before
    slow = DoctorConfig(disk_test_mib=1, min_disk_mb_s=1e9)
    assert check_speed(site_of(tmp_path, doctor=slow))[0].status == "warn"
    big = DoctorConfig(disk_test_mib=1024)
    assert site_of(tmp_path, doctor=big, mode="preflight").disk_test_bytes == 16 * 2**20


def test_a_disk_that_refuses_is_a_failure(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", refuse)
    line = only(check_speed(site_of(tmp_path)))
    assert line.status == "fail"
    assert "No space left" in line.seen
    assert list(tmp_path.iterdir()) == []


def test_a_clock_apart_from_the_file_servers_is_a_warning(tmp_path):
    config = site_of(tmp_path).config
    assert clock_line(config, 0.4).status == "pass"
    line = clock_line(config, -7.0)
    assert (line.status, "-7.00 s" in line.seen) == ("warn", True)


def test_the_innermost_mount_decides():
    assert file_system_of(Path("/shared/runs"), MOUNTS) == "nfs4"
    assert file_system_of(Path("/shared/scratch space/x"), MOUNTS) == "tmpfs"
    assert file_system_of(Path("/home"), MOUNTS) == "overlay"


def test_a_cache_on_a_network_file_system_is_a_warning(tmp_path):
    root = tmp_path / "fake_root"
    (root / "proc").mkdir(parents=True)
    mounts = root / "proc/mounts"
    mounts.write_text("server:/x / lustre rw 0 0\n")
    tools = ToolsConfig(cache=CacheConfig(mode="read_write"))
    line = only(check_file_system(site_of(tmp_path, root=root, tools=tools)))
    assert (line.status, "is on lustre" in line.seen) == ("warn", True)
    assert only(check_file_system(site_of(tmp_path, root=root))).status == "pass"
    mounts.write_text(f"server:/x / lustre rw 0 0\n/dev/sda {tmp_path}/local ext4 rw 0 0\n")
    (tmp_path / "local").mkdir()
    here = ToolsConfig(cache=CacheConfig(mode="read_write", path=f"{tmp_path}/local/c.sqlite"))
    assert only(check_file_system(site_of(tmp_path, root=root, tools=here))).status == "pass"
    assert only(check_file_system(site_of(tmp_path, tools=tools))).status == "pass"


def test_shared_memory_of_a_container_is_too_little_for_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(64 * 2**20, 0, 64 * 2**20))
    line = only(check_shared_memory(site_of(tmp_path, gpus=8)))
    assert (line.status, line.fix) == ("fail", "docker: --shm-size=8192m or --ipc=host")
    assert only(check_shared_memory(site_of(tmp_path))).status == "warn"
    line = only(check_shared_memory(site_of(tmp_path, root=tmp_path)))
    assert (line.status, line.seen) == ("fail", "no /dev/shm")


def test_open_files_are_compared_with_the_episodes(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.resource, "getrlimit", lambda _: (4096, 4096))
    rollout = RolloutConfig(max_concurrent_episodes=1500)
    assert only(check_open_files(site_of(tmp_path, rollout=rollout))).status == "pass"
    rollout = RolloutConfig(max_concurrent_episodes=1600)
    line = only(check_open_files(site_of(tmp_path, rollout=rollout)))
    assert (line.status, line.fix.startswith("ulimit -n 4224")) == ("warn", True)
