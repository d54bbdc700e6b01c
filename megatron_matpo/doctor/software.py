"""The trainer's packages and the rollout environment: versions, and whether they can be imported.

Every import happens in a child process with a deadline, because a broken extension may crash or
hang the process that loads it.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from pathlib import Path

from megatron_matpo.doctor.child import Answer, ask, ask_python
from megatron_matpo.doctor.lines import Line, Site
from megatron_matpo.doctor.pins import pins, same_version
from megatron_matpo.rollout.engine_command import EngineSpec, engine_command

_PINNED = ("torch", "megatron-core", "transformers", "numpy", "safetensors")
_MEGATRON = "import megatron.core; tell(version=megatron.core.__version__)"
_TRANSFORMER_ENGINE = """
import transformer_engine
tell(version=getattr(transformer_engine, "__version__", "?"))
import transformer_engine.pytorch
"""
# NVIDIA's has the kernels; the package index has another project of the same name.
_APEX = """
import importlib.util
import apex
tell(is_nvidia=importlib.util.find_spec("apex.multi_tensor_apply") is not None)
tell(fused=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None)
import amp_C
tell(amp_C=True)
"""
_FLASH = "import flash_attn; tell(version=flash_attn.__version__); import flash_attn_2_cuda"
_NO_DRIVER = re.compile(r"libcuda\b|NVIDIA driver|CUDA driver|no CUDA", re.IGNORECASE)
_SGLANG = "import importlib.metadata as m; tell(version=m.version('sglang'))"


def check_trainer(site: Site) -> list[Line]:
    """`env.trainer`: pinned versions, and Megatron-Core imports."""
    name, fix = "env.trainer", "make setup, or pip install '.[trainer]' (docs/docker.md: the image)"
    wrong: list[str] = []
    for package in _PINNED:
        try:
            have = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{package} is not installed")
            continue
        if package in pins() and not same_version(have, pins()[package]):
            wrong.append(f"{package} {have}, the pin is {pins()[package]}")
    if wrong:
        return [Line(name, "fail", "; ".join(wrong), fix)]
    if site.mode == "preflight":  # the trainer imports it a moment later
        return [Line(name, "pass", "pinned versions")]
    answer = ask_python(sys.executable, _MEGATRON, site.config.doctor.check_timeout_s)
    if answer.problem:
        return [Line(name, "fail", f"Megatron-Core cannot be imported: {answer.problem}", fix)]
    return [Line(name, "pass", f"Megatron-Core {answer.told['version']}, pinned versions")]


def _import(site: Site, package: str, code: str) -> Answer | None:
    """What importing in a child comes to; None if the package is not installed at all."""
    finder = f"import importlib.util as u; tell(found=u.find_spec({package!r}) is not None)\n"
    body = "\n".join(f"    {line}" for line in code.strip().splitlines())
    script = f"{finder}if u.find_spec({package!r}) is not None:\n{body}\n"
    answer = ask_python(sys.executable, script, site.config.doctor.check_timeout_s)
    return None if answer.told.get("found") is False else answer


def _needs_gpu_packages(site: Site) -> bool:
    return site.wants_gpus or site.mode == "build"


def _is_missing_driver(site: Site, answer: Answer) -> bool:
    """The image is built where there is no driver, which extensions may ask for when loaded."""
    return site.mode == "build" and _NO_DRIVER.search(answer.problem) is not None


def check_transformer_engine(site: Site) -> list[Line]:
    """`env.transformer_engine`: needed on GPUs."""
    name = "env.transformer_engine"
    fix = "install Transformer Engine against this torch, as the Dockerfile does"
    answer = _import(site, "transformer_engine", _TRANSFORMER_ENGINE)
    if answer is None:
        if _needs_gpu_packages(site):
            return [Line(name, "fail", "not installed; the layers on a GPU are its", fix)]
        return [Line(name, "pass", "not installed; the CPU platform needs none")]
    if _is_missing_driver(site, answer):
        return [Line(name, "skipped", "installed; cannot be loaded without a driver")]
    if answer.problem:
        status = "fail" if _needs_gpu_packages(site) else "warn"
        return [Line(name, status, f"cannot be imported: {answer.problem}", fix)]
    return [Line(name, "pass", f"Transformer Engine {answer.told['version']}")]


def check_apex(site: Site) -> list[Line]:
    """`env.apex`: optional; NVIDIA's, not its namesake."""
    name = "env.apex"
    fix = "build NVIDIA's apex from source with APEX_CPP_EXT=1 APEX_CUDA_EXT=1 (Dockerfile)"
    answer = _import(site, "apex", _APEX)
    if answer is None:
        if _needs_gpu_packages(site):
            seen = "not installed: weight gradients are accumulated without its fused kernel"
            return [Line(name, "warn", seen, fix)]
        return [Line(name, "pass", "not installed; the CPU platform needs none")]
    if answer.told.get("is_nvidia") is False:
        seen = "a project of the same name from the package index, not NVIDIA's"
        return [Line(name, "fail", seen, f"pip uninstall apex; {fix}")]
    if _is_missing_driver(site, answer):
        return [Line(name, "skipped", "installed; cannot be loaded without a driver")]
    if answer.problem:
        return [Line(name, "fail", f"NVIDIA apex without its extensions: {answer.problem}", fix)]
    if not answer.told.get("fused"):
        seen = "NVIDIA apex, but without fused_weight_gradient_mlp_cuda"
        return [Line(name, "warn", seen, fix)]
    return [Line(name, "pass", "NVIDIA apex with its fused kernels")]


def check_flash_attn(site: Site) -> list[Line]:
    """`env.flash_attn`: optional; Transformer Engine takes cuDNN's attention without it."""
    name = "env.flash_attn"
    fix = "install flash-attn against this torch, as the Dockerfile does"
    answer = _import(site, "flash_attn", _FLASH)
    if answer is None:
        seen = "not installed: Transformer Engine takes cuDNN's fused attention"
        return [Line(name, "pass", seen)]
    if _is_missing_driver(site, answer):
        return [Line(name, "skipped", "installed; cannot be loaded without a driver")]
    if answer.problem:
        seen = f"cannot be imported: {answer.problem}"
        return [Line(name, "fail", seen, f"{fix}, or pip uninstall flash-attn")]
    return [Line(name, "pass", f"flash-attn {answer.told['version']}")]


def check_sglang(site: Site) -> list[Line]:
    """`rollout.sglang`: the pinned SGLang in `rollout.python`, and that it can start to serve."""
    name, python = "rollout.sglang", site.config.rollout.python
    if site.recipe and (site.config.rollout.replay or not site.config.agents):
        return [Line(name, "pass", "the recipe starts no engine")]
    fix = "make setup, or name the Python of an environment with the pinned SGLang: rollout.python="
    if not Path(python).is_file() or not os.access(python, os.X_OK):
        return [Line(name, "fail", f"rollout.python={python}: no such program", fix)]
    timeout_s = site.config.doctor.check_timeout_s
    answer = ask_python(python, _SGLANG, timeout_s)
    if answer.problem:
        return [Line(name, "fail", f"{python}: no SGLang: {answer.problem}", fix)]
    have, want = answer.told["version"], pins().get("sglang", "")
    if want and not same_version(have, want):
        return [Line(name, "fail", f"SGLang {have}, the pin is {want}", fix)]
    if site.mode == "preflight":  # the engine imports it a moment later
        return [Line(name, "pass", f"SGLang {have}")]
    device = "cuda" if _needs_gpu_packages(site) else "cpu"
    spec = EngineSpec(python=python, model_path="-", port=1, internal_port=2, device=device)
    command = engine_command(spec)
    answer = ask([*command.argv[:2], "--help"], timeout_s, command.env)
    if _is_missing_driver(site, answer):
        return [Line(name, "skipped", f"SGLang {have}; cannot be loaded without a driver")]
    if answer.problem:
        return [Line(name, "fail", f"SGLang {have} cannot start: {answer.problem}", fix)]
    return [Line(name, "pass", f"SGLang {have}, imports")]
