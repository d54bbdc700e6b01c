"""What the plan and the precision policy know about GPUs. Torch-free.

Sources, per column:

* memory: what PyTorch reports as the device's total, which is less than the name says. A800:
  github.com/hahnyuan/PB-LLM issue 3 (79.33 GiB); A100: levihsu/OOTDiffusion issue 235 (79.25 GiB);
  H100: vllm-project/vllm issue 27508 (79.11 GiB); H800: the H100's (same board, same memory);
  H200: the 143,771 MiB of nvidia-smi less the 0.55 GiB by which the two differ on an H100 (139.85);
* bf16 and fp8: dense tensor-core peaks of the NVIDIA data sheets of A100 (312), H100 SXM and H200
  SXM (989 and 1,979: half of the figures "with sparsity"); A800 and H800 have the cores of A100 and
  H100; the boards PCIe and NVL have a line of their own in the data sheets of H100 and H200;
* capability: developer.nvidia.com/cuda-gpus;
* NVLink, both directions together: the same data sheets (600, 900); A800 and H800 are cut to
  400 GB/s (A800: NVIDIA's statement to Reuters, November 2022; H800: arXiv:2505.09343, section 4).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from megatron_matpo.errors import ConfigError

Capability = tuple[int, int]
"""CUDA compute capability: (8, 0) is sm_80."""


@dataclass(frozen=True)
class Gpu:
    """One GPU model."""

    name: str
    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float
    """0 without FP8 tensor cores."""
    capability: Capability
    nvlink_gb_s: float


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-80G", 79.25, 312, 0, (8, 0), 600),
        Gpu("A800-80G", 79.33, 312, 0, (8, 0), 400),
        Gpu("H100-80G", 79.11, 989, 1979, (9, 0), 900),
        Gpu("H800-80G", 79.11, 989, 1979, (9, 0), 400),
        Gpu("H200-141G", 139.85, 989, 1979, (9, 0), 900),
    )
}

_SLOWER_BOARDS = (("H100 PCIe", 756), ("H800 PCIe", 756), ("H100 NVL", 835), ("H200 NVL", 835))
"""Parts of CUDA's names of boards with the chip of a row above at a lower clock; bf16 peaks."""


def check_gpu_name(name: str) -> str:
    """What is wrong with `cluster.gpu=name`; empty if nothing is."""
    if not name or name in GPUS:
        return ""
    known = {**{key.lower(): key for key in GPUS}, **{k.split("-")[0].lower(): k for k in GPUS}}
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    hint = f"; did you mean {known[close[0]]}?" if close else ""
    return f"cluster.gpu={name}: expected one of {', '.join(GPUS)}{hint}"


def find_gpu(name: str) -> Gpu | None:
    """The table's row; None for the empty name (unknown, or for the driver to say).

    Raises:
        ConfigError: a name that the table does not have.
    """
    if problem := check_gpu_name(name):
        raise ConfigError(problem)
    return GPUS.get(name)


def peak_flops(device_name: str, *, is_fp8: bool = False) -> float:
    """Dense FLOP/s of a device by CUDA's name for it; 0 if it is not in the table.

    Without FP8 tensor cores `is_fp8` changes nothing.
    """
    for board, bf16_tflops in _SLOWER_BOARDS:
        if board in device_name:
            return bf16_tflops * 1e12 * (2 if is_fp8 else 1)
    for gpu in GPUS.values():
        if gpu.name.split("-")[0] in device_name:
            return 1e12 * (gpu.fp8_tflops if is_fp8 and gpu.fp8_tflops else gpu.bf16_tflops)
    return 0.0
