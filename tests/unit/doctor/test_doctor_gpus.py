"""Proves what the doctor makes of nvidia-smi's answers (a fake program), and of torch's real ones.

Not proved: that a real driver writes such lines; the fields are those of nvidia-smi's manual.
"""

from __future__ import annotations

import pytest

from megatron_matpo.config.run import ClusterConfig
from megatron_matpo.doctor import gpus
from megatron_matpo.doctor.gpus import (
    check_devices,
    check_driver,
    check_precision,
    check_torch,
    parse_listing,
)
from tests.helpers.doctor_site import fake_nvidia_smi, fake_program, only, site_of


def test_listing_is_read_field_by_field():
    (gpu,) = parse_listing("0, NVIDIA H200, 9.0, 143771, 12, 570.86.15\n")
    assert (gpu.index, gpu.name, gpu.capability) == (0, "NVIDIA H200", (9, 0))
    assert (gpu.memory_mib, gpu.used_mib, gpu.driver) == (143771, 12, "570.86.15")


def test_all_is_well_on_a_node_of_eight(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch)
    site = site_of(tmp_path, gpus=8)
    assert only(check_driver(site)).status == "pass"
    line = only(check_devices(site))
    assert (line.status, line.seen) == ("pass", "8 x NVIDIA A800-SXM4-80GB, 81920 MiB, sm_80")


def test_an_old_driver_is_a_warning_that_names_the_package(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch, driver="550.163.01")
    line = only(check_driver(site_of(tmp_path, gpus=8)))
    assert line.status == "warn"
    assert "550.163.01" in line.seen and "cuda-compat-13" in line.fix


def test_a_missing_gpu_is_a_failure(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch, count=7)
    line = only(check_devices(site_of(tmp_path, gpus=8)))
    assert line.status == "fail"
    assert line.seen.startswith("7 x") and "gpus_per_node=8" in line.seen


def test_another_model_than_the_recipe_names_is_a_failure(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch)
    cluster = ClusterConfig(gpus_per_node=8, gpu="H100-80G")
    line = only(check_devices(site_of(tmp_path, cluster=cluster)))
    assert line.status == "fail"
    assert "H100-80G is sm_90" in line.seen


def test_memory_in_use_is_a_warning(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch, count=1, used=40000)
    line = only(check_devices(site_of(tmp_path, gpus=1)))
    assert (line.status, line.seen) == ("warn", "in use before the run: GPU 0: 40000 MiB")


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", "ended with code 9: NVIDIA-SMI has failed"),
        ("exit 0", "lists no GPU"),
        ("echo 'No devices were found'", "no list of GPUs"),
    ],
)
def test_a_driver_that_fails_is_quoted(tmp_path, monkeypatch, script, says):
    fake_program(tmp_path, monkeypatch, "nvidia-smi", script)
    line = only(check_driver(site_of(tmp_path, gpus=8)))
    assert line.status == "fail"
    assert says in line.seen
    assert only(check_devices(site_of(tmp_path, gpus=8))).status == "fail"


def test_a_driver_that_hangs_is_no_wait_for_ever(tmp_path, monkeypatch):
    fake_program(tmp_path, monkeypatch, "nvidia-smi", "exec sleep 60")
    monkeypatch.setattr(gpus, "_SMI_TIMEOUT_S", 0.2)
    line = only(check_driver(site_of(tmp_path, gpus=8)))
    assert line.status == "fail"
    assert "hangs" in line.seen


def test_the_cpu_platform_needs_no_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    site = site_of(tmp_path)
    assert only(check_driver(site)).status == "pass"
    assert only(check_devices(site)).status == "pass"


def test_real_torch_answers_and_lacks_the_gpus_of_a_fake_driver(tmp_path, monkeypatch):
    assert only(check_torch(site_of(tmp_path))).status == "pass"
    fake_nvidia_smi(tmp_path, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    line = only(check_torch(site_of(tmp_path, gpus=8)))
    assert line.status == "fail"
    assert "nvidia-smi lists 8" in line.seen


def test_fp8_on_ampere_is_refused_with_the_choices(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch)
    line = only(check_precision(site_of(tmp_path, gpus=8, precision="fp8")))
    assert line.status == "fail"
    assert "sm_80" in line.seen and "precision=bf16" in line.seen
    line = only(check_precision(site_of(tmp_path, gpus=8)))
    assert (line.status, line.seen.partition(":")[0]) == ("pass", "bf16")
