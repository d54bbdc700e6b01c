"""Proves that packages are imported in a child: broken, crashing, hanging and false ones are told.

The packages are small folders made here; the real ones of their names need GPUs.
Megatron-Core and SGLang are the real ones.
"""

from __future__ import annotations

import sys

import pytest

from megatron_matpo.config.doctor import DoctorConfig
from megatron_matpo.config.rollout import RolloutConfig
from megatron_matpo.doctor import software
from megatron_matpo.doctor.software import (
    check_apex,
    check_flash_attn,
    check_sglang,
    check_trainer,
    check_transformer_engine,
)
from tests.helpers.doctor_site import only, site_of

ROLLOUT_PYTHON = ".venv-rollout/bin/python"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder on the path of child processes: write("name/file.py", "code")."""
    folder = tmp_path / "fake_packages"
    folder.mkdir()
    import os

    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")

    def write(name: str, code: str = "") -> None:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)

    return write


def test_what_is_not_installed_fails_only_where_gpus_are(tmp_path):
    assert only(check_transformer_engine(site_of(tmp_path))).status == "pass"
    line = only(check_transformer_engine(site_of(tmp_path, gpus=8)))
    assert (line.status, "not installed" in line.seen) == ("fail", True)
    assert only(check_apex(site_of(tmp_path, gpus=8))).status == "warn"
    assert only(check_flash_attn(site_of(tmp_path, gpus=8))).status == "pass"


def test_a_package_that_imports_is_named_with_its_version(tmp_path, packages):
    packages("transformer_engine/__init__.py", "__version__ = '2.11.0'")
    packages("transformer_engine/pytorch.py")
    line = only(check_transformer_engine(site_of(tmp_path, gpus=8)))
    assert (line.status, line.seen) == ("pass", "Transformer Engine 2.11.0")


def test_a_package_that_kills_its_process_is_a_line(tmp_path, packages):
    packages("transformer_engine/__init__.py", "import os; os.kill(os.getpid(), 11)")
    line = only(check_transformer_engine(site_of(tmp_path, gpus=8)))
    assert line.status == "fail"
    assert "killed by SIGSEGV" in line.seen


def test_a_package_that_hangs_is_a_line(tmp_path, packages):
    packages("flash_attn/__init__.py", "import time; time.sleep(60)")
    doctor = DoctorConfig(check_timeout_s=1.0)
    line = only(check_flash_attn(site_of(tmp_path, gpus=8, doctor=doctor)))
    assert line.status == "fail"
    assert "no answer in 1 s" in line.seen


def test_the_namesake_of_apex_is_told_from_nvidias(tmp_path, packages):
    packages("apex/__init__.py")
    line = only(check_apex(site_of(tmp_path, gpus=8)))
    assert line.status == "fail"
    assert "same name" in line.seen and "pip uninstall apex" in line.fix


def test_apex_without_its_extensions_fails_and_with_them_passes(tmp_path, packages):
    packages("apex/__init__.py")
    packages("apex/multi_tensor_apply/__init__.py")
    line = only(check_apex(site_of(tmp_path, gpus=8)))
    assert line.status == "fail"
    assert "amp_C" in line.seen
    packages("amp_C.py")
    assert only(check_apex(site_of(tmp_path, gpus=8))).status == "warn"
    packages("fused_weight_gradient_mlp_cuda.py")
    assert only(check_apex(site_of(tmp_path, gpus=8))).status == "pass"


def test_a_missing_driver_is_no_failure_while_an_image_is_built(tmp_path, packages):
    text = "libcuda.so.1: cannot open shared object file: No such file or directory"
    packages("transformer_engine/__init__.py", f"raise ImportError({text!r})")
    assert only(check_transformer_engine(site_of(tmp_path, gpus=8))).status == "fail"
    assert only(check_transformer_engine(site_of(tmp_path, mode="build"))).status == "skipped"
    packages("transformer_engine/__init__.py", "raise ImportError('undefined symbol: _ZN3c10')")
    assert only(check_transformer_engine(site_of(tmp_path, mode="build"))).status == "fail"


def test_the_trainers_environment_is_that_of_the_pins(tmp_path, monkeypatch):
    line = only(check_trainer(site_of(tmp_path)))
    assert (line.status, line.seen) == ("pass", "Megatron-Core 0.16.1, pinned versions")
    monkeypatch.setattr(software, "pins", lambda: {"torch": "9.9.9", "numpy": "1.0"})
    line = only(check_trainer(site_of(tmp_path)))
    assert line.status == "fail"
    assert "torch 2.13.0" in line.seen and "the pin is 9.9.9" in line.seen and "numpy" in line.seen


@pytest.mark.slow
def test_the_rollout_environment_has_the_pinned_sglang_and_it_starts(tmp_path):
    site = site_of(tmp_path, rollout=RolloutConfig(python=ROLLOUT_PYTHON))
    line = only(check_sglang(site))
    assert (line.status, line.seen) == ("pass", "SGLang 0.5.20, imports")


def test_another_version_of_sglang_or_none_is_a_failure(tmp_path, monkeypatch):
    site = site_of(tmp_path, mode="preflight", rollout=RolloutConfig(python=ROLLOUT_PYTHON))
    monkeypatch.setattr(software, "pins", lambda: {"sglang": "0.5.22"})
    line = only(check_sglang(site))
    assert (line.status, line.seen) == ("fail", "SGLang 0.5.20, the pin is 0.5.22")
    line = only(check_sglang(site_of(tmp_path, rollout=RolloutConfig(python=sys.executable))))
    assert line.status == "fail"
    assert "no SGLang" in line.seen
    line = only(check_sglang(site_of(tmp_path, rollout=RolloutConfig(python="/nowhere/python"))))
    assert (line.status, "no such program" in line.seen) == ("fail", True)
