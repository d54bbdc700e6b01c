"""GPUs as the driver shows them (nvidia-smi), as torch does, and whether the two agree."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from megatron_matpo.config.gpus import GPUS, Capability
from megatron_matpo.config.precision import Platform, decide_precision
from megatron_matpo.doctor.child import ask_python
from megatron_matpo.doctor.lines import Line, Site
from megatron_matpo.errors import ConfigError

MIN_DRIVER = 580
"""For CUDA 13 without the forward-compatibility package.
Source: docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html, table 1."""
_FIELDS = "index,name,compute_cap,memory.total,memory.used,driver_version"
_SMI = ("nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")
_SMI_TIMEOUT_S = 30.0
"""A healthy driver answers in a second or two; a GPU that has fallen off the bus can hang it."""
_BUSY_MIB = 1024
"""What another process must hold of a GPU to be mentioned; the driver itself holds less."""
_TORCH = """
import torch
version = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else ""
tell(torch=torch.__version__, cuda=torch.version.cuda or "", count=torch.cuda.device_count(),
     nccl=version)
for index in range(torch.cuda.device_count()):
    matrix = torch.ones(256, 256, device=f"cuda:{index}")
    assert float((matrix @ matrix)[0, 0]) == 256.0, f"GPU {index} multiplies wrongly"
tell(works=True)
"""


@dataclass(frozen=True)
class SeenGpu:
    """One line of nvidia-smi."""

    index: int
    name: str
    capability: Capability
    memory_mib: int
    used_mib: int
    driver: str


def parse_listing(text: str) -> list[SeenGpu]:
    """What nvidia-smi says.

    Raises:
        ValueError: a line is not what was asked for.
    """
    gpus: list[SeenGpu] = []
    for line in text.splitlines():
        if not line.strip():
            continue
        index, name, capability, total, used, driver = (part.strip() for part in line.split(","))
        major, _, minor = capability.partition(".")
        parsed = (int(major), int(minor))
        gpus.append(SeenGpu(int(index), name, parsed, int(total), int(used), driver))
    return gpus


def list_gpus() -> tuple[list[SeenGpu], str]:
    """GPUs and what went wrong; the latter is empty if nothing did."""
    try:
        done = subprocess.run(_SMI, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S)
    except FileNotFoundError:
        return [], "no nvidia-smi on PATH"
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi gave no answer in {_SMI_TIMEOUT_S:.0f} s: the driver hangs"
    except OSError as error:
        return [], f"nvidia-smi: {error.strerror or error}"
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split())
        return [], f"nvidia-smi ended with code {done.returncode}: {said[:200]}"
    try:
        gpus = parse_listing(done.stdout)
    except ValueError:
        return [], f"nvidia-smi said what is no list of GPUs: {done.stdout[:200]!r}"
    return (gpus, "") if gpus else ([], "nvidia-smi lists no GPU")


def check_driver(site: Site) -> list[Line]:
    """`gpu.driver`."""
    name = "gpu.driver"
    gpus, problem = list_gpus()
    if not gpus:
        if site.wants_gpus:
            return [Line(name, "fail", problem, "install NVIDIA's driver, or leave the node out")]
        return [Line(name, "pass", f"{problem}; the CPU platform needs none")]
    driver = gpus[0].driver
    major = driver.partition(".")[0]
    seen = f"driver {driver}"
    if major.isdigit() and int(major) < MIN_DRIVER:
        return [
            Line(
                name,
                "warn",
                f"{seen}: CUDA 13 needs {MIN_DRIVER} or newer",
                f"update to R{MIN_DRIVER}, or use an image with NVIDIA's cuda-compat-13 package "
                "(docs/docker.md); gpu.torch says whether it works as it is",
            )
        ]
    return [Line(name, "pass", seen)]


def check_devices(site: Site) -> list[Line]:
    """`gpu.devices`: number, model, memory in use."""
    name, wanted = "gpu.devices", site.config.cluster.gpus_per_node
    gpus, problem = list_gpus()
    if not gpus:
        if wanted:
            seen = f"none ({problem}); cluster.gpus_per_node={wanted}"
            return [Line(name, "fail", seen, "repair or leave out the node (`--exclude`)")]
        return [Line(name, "pass", "none, as cluster.gpus_per_node=0 says")]
    models = sorted({gpu.name for gpu in gpus})
    smallest = min(gpu.memory_mib for gpu in gpus)
    lowest = min(gpu.capability for gpu in gpus)
    seen = f"{len(gpus)} x {', '.join(models)}, {smallest} MiB, sm_{lowest[0]}{lowest[1]}"
    if len(gpus) < wanted:
        fix = "ask Slurm for them (--gres=gpu:N), or repair or leave out the node"
        return [Line(name, "fail", f"{seen}; cluster.gpus_per_node={wanted}", fix)]
    named = GPUS.get(site.config.cluster.gpu)
    if wanted and named and lowest != named.capability:
        seen += f"; cluster.gpu={named.name} is sm_{named.capability[0]}{named.capability[1]}"
        return [
            Line(name, "fail", seen, "name the model that is there, or leave cluster.gpu empty")
        ]
    lines: list[Line] = []
    busy = [f"GPU {gpu.index}: {gpu.used_mib} MiB" for gpu in gpus if gpu.used_mib > _BUSY_MIB]
    if wanted and busy:
        fix = "end the processes that nvidia-smi lists; a dead job may have left them"
        lines.append(Line(name, "warn", f"in use before the run: {', '.join(busy)}", fix))
    if len(models) > 1:
        fix = "the slowest sets the pace; use nodes of one kind"
        lines.append(Line(name, "warn", f"unlike GPUs: {', '.join(models)}", fix))
    return lines or [Line(name, "pass", seen)]


def check_torch(site: Site) -> list[Line]:
    """`gpu.torch`: torch in a child process computes on every GPU that the driver lists."""
    name = "gpu.torch"
    answer = ask_python(sys.executable, _TORCH, site.config.doctor.check_timeout_s)
    told = answer.told
    fix = "reinstall torch as pyproject.toml pins it; on GPUs the driver must fit its CUDA"
    if "torch" not in told:
        return [Line(name, "fail", f"torch cannot be imported: {answer.problem}", fix)]
    cuda = f", CUDA {told['cuda']}" if told["cuda"] else ", a CPU build"
    nccl = f", NCCL {told['nccl']}" if told["nccl"] else ""
    seen = f"torch {told['torch']}{cuda}{nccl}, {told['count']} GPUs"
    if not site.wants_gpus:
        return [Line(name, "pass", seen)]
    if answer.problem:
        return [Line(name, "fail", f"{seen}; {answer.problem}", fix)]
    num_listed = len(list_gpus()[0])
    if told["count"] < max(num_listed, site.config.cluster.gpus_per_node):
        fix = "look at CUDA_VISIBLE_DEVICES and at the driver's version (gpu.driver)"
        return [Line(name, "fail", f"{seen}; nvidia-smi lists {num_listed}", fix)]
    return [Line(name, "pass", f"{seen}, each computes")]


def check_precision(site: Site) -> list[Line]:
    """`gpu.precision`: what `precision` comes to on these GPUs."""
    name = "gpu.precision"
    gpus, _ = list_gpus()
    capability = min((gpu.capability for gpu in gpus), default=None)
    try:
        precision = decide_precision(site.config, Platform(capability))
    except ConfigError as error:
        return [Line(name, "fail", str(error), "see docs/precision.md")]
    fp8 = f" with {precision.fp8_recipe} FP8" if precision.fp8_recipe else ""
    return [Line(name, "pass", f"{precision.parameters}{fp8}: {precision.reason}")]
