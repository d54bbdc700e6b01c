"""How one SGLang server is started: a pure function of its settings. Standard library only.

The rollout environment's Python runs `sglang_cpu/serve.py` by file path on every device: it starts
stock SGLang and, unlike `sglang serve`, takes the key from the environment.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from megatron_matpo.config.plan import EnginePlace
    from megatron_matpo.config.root import Config

SERVE = Path(__file__).parent / "sglang_cpu" / "serve.py"
KEY_VARIABLE = "MATPO_ENGINE_KEY"
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
}
"""Environment of processes that hold weights on a CPU. By default glibc gives every large tensor
back to the kernel when it is freed, and touching fresh pages takes six times as long as copying
weights does (0.27 s and 0.04 s for 590 MB). One arena: others hold no block above 64 MiB."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """Settings of one server."""

    python: str
    """Python of the environment that has SGLang."""
    model_path: str
    """Folder in Hugging Face's layout."""
    port: int
    internal_port: int
    """Rendezvous of the server's own tensor-parallel group. SGLang otherwise picks a free port and
    binds it later, which another server on the machine can take in between."""
    host: str = "127.0.0.1"
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: str = "auto"
    tensor_parallel: int = 1
    base_gpu_id: int = 0
    """First GPU, counted among the visible ones; the server takes `tensor_parallel` from there."""
    context_length: int = 0
    """Tokens; 0: what the model's configuration says."""
    max_running_requests: int = 64
    max_total_tokens: int = 0
    """KV cache in tokens; 0: what `mem_fraction` allows."""
    mem_fraction: float = 0.8
    api_key: str = field(default="", repr=False)
    """Asked of every request but health checks; empty: none. SGLang has a second, admin key, which
    would have to be the only one on control endpoints; requests and weights are equally trusted
    here, so one key serves both."""
    seed: int = 0
    weight_version: str = "0"
    """What the server calls the weights that it loads itself."""
    gives_memory_back: bool = False
    """The engine can release weights and KV cache (SGLang's memory saver, which only GPUs have)."""
    extra_args: tuple[str, ...] = ()
    """Appended as they are: they win over the arguments chosen here."""


@dataclass(frozen=True)
class EngineCommand:
    """What to start. `str()` of it can be logged and pasted into a shell; it holds no secret."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    """To add to the environment; holds the key."""

    def __str__(self) -> str:
        """The command line."""
        return shlex.join(self.argv)


def engine_command(spec: EngineSpec) -> EngineCommand:
    """The command that starts `spec`'s server."""
    args = [
        *("--model-path", spec.model_path),
        *("--host", spec.host, "--port", str(spec.port)),
        *("--nccl-port", str(spec.internal_port)),
        *("--device", spec.device, "--dtype", spec.dtype),
        *("--tensor-parallel-size", str(spec.tensor_parallel)),
        *("--max-running-requests", str(spec.max_running_requests)),
        *("--mem-fraction-static", str(spec.mem_fraction)),
        *("--random-seed", str(spec.seed)),
        *("--weight-version", spec.weight_version),
        # Tokens in, tokens out: text would only be decoded to be thrown away.
        "--skip-tokenizer-init",
        # A part of an answer holds what is new, not all that came before.
        "--incremental-streaming-output",
        # No structured output is asked for, and the default back-end is one more thing to load.
        *("--grammar-backend", "none"),
        # An idle scheduler polls: one core per engine, taken from the trainer (measured on 2 cores:
        # 52 % of a core without this flag, 1.5 % with it).
        "--sleep-on-idle",
        # One line per request tells nothing that the manager does not record.
        *("--log-level-http", "warning"),
    ]
    if spec.context_length:
        args += ["--context-length", str(spec.context_length)]
    if tokens := _kv_tokens(spec):
        args += ["--max-total-tokens", str(tokens)]
    if spec.device == "cpu":
        args += _CPU_ARGS
    else:
        args += ["--base-gpu-id", str(spec.base_gpu_id)]
        args += ["--enable-memory-saver"] * spec.gives_memory_back
    env = {
        # /health answers at once and /health_generate generates; by default both take a second.
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if spec.device == "cpu":
        env |= _CPU_ENV
    if spec.api_key:
        env[KEY_VARIABLE] = spec.api_key
    return EngineCommand((spec.python, str(SERVE), *args, *spec.extra_args), env)


_CPU_ARGS = [
    # The only back-end that runs on a CPU without AMX; serve.py registers a batched version of it.
    *("--attention-backend", "torch_native"),
    *("--sampling-backend", "pytorch"),
    # Overlap hides host work behind the device's; here both are the same two cores (a tenth slower
    # with it, measured).
    "--disable-overlap-schedule",
]
_CPU_ENV = {
    "SGLANG_USE_CPU_ENGINE": "1",
    # Threads cost more than they bring for a small model: 5 times slower with one per core.
    "OMP_NUM_THREADS": "1",
    **KEEP_FREED_MEMORY,
}


def _kv_tokens(spec: EngineSpec) -> int:
    """KV cache in tokens; 0 leaves it to SGLang."""
    if spec.max_total_tokens or spec.device != "cpu":
        return spec.max_total_tokens
    # On a CPU `mem_fraction` is of the machine's memory, which the trainer shares: take what the
    # requests can use at most (SGLang lowers it if the fraction is less).
    return spec.max_running_requests * spec.context_length


UNPUSHED = "unpushed"
"""Weight version of an engine before the trainer's first push: no number, so that a new start is
told from the one before, and that no token of its own weights is ever taken."""


def engine_spec(
    config: Config, place: EnginePlace, key: str, *, serves_own_weights: bool
) -> EngineSpec:
    """The server that the plan puts at `place`; it listens on that address only.

    `serves_own_weights`: no trainer pushes; what the engine loads is version 0.
    """
    is_cpu = config.cluster.device == "cpu"
    return EngineSpec(
        python=config.rollout.python,
        model_path=config.model.path,
        host=place.host,
        port=place.port,
        internal_port=place.internal_port,
        device="cpu" if is_cpu else "cuda",
        dtype="float32" if is_cpu else "bfloat16",
        tensor_parallel=config.rollout.tensor,
        base_gpu_id=place.gpus[0] if place.gpus else 0,
        context_length=config.rollout.context_length,
        max_running_requests=config.rollout.max_running_requests,
        max_total_tokens=config.rollout.max_total_tokens,
        mem_fraction=config.rollout.mem_fraction,
        api_key=key,
        # Engines with one seed would answer the same prompt with the same samples.
        seed=config.run.seed + place.index,
        gives_memory_back=config.cluster.placement == "colocated",
        weight_version="0" if serves_own_weights else UNPUSHED,
        extra_args=tuple(config.rollout.engine_args),
    )
