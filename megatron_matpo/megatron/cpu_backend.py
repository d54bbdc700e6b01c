"""Run stock Megatron-Core 0.16.1 on a machine without CUDA (gloo, local layer spec).

Megatron-Core names CUDA in its source: `device="cuda"`, `torch.cuda.current_device()`, streams,
string comparisons with "torch.cuda.FloatTensor". `install` gives every loaded `megatron.core`
module its own stand-in for the global name `torch`. Invariants:

* `torch` itself stays as it is for everybody else; the two exceptions, `Tensor.cuda` and
  `Tensor.type`, behave differently only when the caller is a `megatron.core` module;
* no file of Megatron-Core is changed, no mathematics is replaced;
* calling `install` again only covers the modules that were imported since.

What each part is for (lines of Megatron-Core 0.16.1):

* factories with `device="cuda"`: `schedules.py:596,983,2138`, `clip_grads.py:90-207`,
  `optimizer.py:473-485,907`, `param_and_grad_buffer.py:768`;
* `cuda.current_device`, `set_device`: `param_and_grad_buffer.py:783-806`, `mappings.py:91-181`,
  `p2p_communication.py:190-321`, `layers.py:261,873`, `rotary_pos_embedding.py:78,162`;
* `cuda.synchronize`, streams, events: `p2p_communication.py:242,398`, `fully_parallel.py:281`;
* `cuda` random state and `manual_seed`: `tensor_parallel/random.py:235-238,422`;
* `_get_cuda_rng_state`, `_set_cuda_rng_state`: `tensor_parallel/random.py:41-110` call into the
  CUDA runtime itself;
* `te_general_gemm`: `moe_utils.py:1192` asks whether it is None where Transformer Engine is absent,
  and nothing has defined it (`moe_utils.py:21-38`);
* `maybe_move_tensor_to_cpu`: `token_dispatcher.py:879` wants numbers of tokens as an array, which
  only a tensor of a GPU becomes;
* `Tensor.type`: `distrib_optimizer.py:361,420,582`, `clip_grads.py:167`, `optimizer.py:671-690`;
* `Tensor.cuda`: `language_module.py:244`, `distrib_optimizer.py:1089`, `exchange_utils.py:336`.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
import warnings
from typing import Any

import torch

CPU = torch.device("cpu")

# Everything of Megatron-Core that this package uses; imported here so that `install` covers it.
_MODULES = (
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.tensor_parallel.random",
)

_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "full", "full_like", "ones", "ones_like",
    "rand", "randn", "tensor", "zeros", "zeros_like",
)  # fmt: skip


class _Stream:
    """CPU work is done when the call returns, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *args: Any) -> _Event:
        return _Event()


class _Event:
    """See `_Stream`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stand-in for calls that only make sense on a GPU."""


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _move_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What Megatron's function of another name does with a tensor of a GPU."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _stand_in(real: types.ModuleType, overrides: dict[str, Any]) -> types.ModuleType:
    """A module like `real` with some names replaced; names loaded later fall through."""
    module = types.ModuleType(real.__name__)
    own = {k: v for k, v in vars(real).items() if k not in ("__name__", "__spec__", "__loader__")}
    vars(module).update(own)
    vars(module).update(overrides)
    vars(module)["__getattr__"] = lambda name: getattr(real, name)
    return module


def _cuda_stand_in() -> types.ModuleType:
    """`torch.cuda` as Megatron-Core sees it on a CPU: one device, which is the CPU."""
    return _stand_in(
        torch.cuda,
        {
            "current_device": lambda: CPU,
            "set_device": _nothing,
            "device_count": lambda: 1,
            "synchronize": _nothing,
            "empty_cache": _nothing,
            "Stream": _Stream,
            "Event": _Event,
            "current_stream": lambda *a, **k: _Stream(),
            "default_stream": lambda *a, **k: _Stream(),
            "stream": lambda stream: contextlib.nullcontext(),
            "manual_seed": lambda seed: torch.manual_seed(seed),
            "get_rng_state": _get_rng_state,
            "set_rng_state": _set_rng_state,
        },
    )


def _on_cpu(factory: Any) -> Any:
    """A tensor factory that reads `device="cuda"` as the CPU."""

    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if isinstance(device, int | str) and (isinstance(device, int) or "cuda" in device):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


def _torch_stand_in() -> types.ModuleType:
    overrides: dict[str, Any] = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    overrides["cuda"] = _cuda_stand_in()
    return _stand_in(torch, overrides)


def _caller_is_megatron() -> bool:
    """Whether the function that called our caller belongs to Megatron-Core."""
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")


def _patch_tensor_methods() -> None:
    """Methods cannot be given to one package alone, so these two look at who calls."""
    real_cuda, real_type = torch.Tensor.cuda, torch.Tensor.type

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _caller_is_megatron() else real_cuda(self, *args, **kwargs)

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = real_type(self, *args, **kwargs)
        if isinstance(result, str) and _caller_is_megatron() and "cuda" not in result:
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.cuda = cuda  # type: ignore[method-assign]
    torch.Tensor.type = tensor_type  # type: ignore[method-assign]


_stand_in_torch: types.ModuleType | None = None


def install() -> None:
    """Make Megatron-Core usable on this CPU-only process; call before any of its objects exists.

    Idempotent. Every rank of a CPU run calls it; nothing is communicated.
    """
    global _stand_in_torch
    with warnings.catch_warnings():
        # "Transformer Engine and Apex are not installed": true, and nothing to do about on a CPU.
        warnings.simplefilter("ignore", UserWarning)
        for name in _MODULES:
            importlib.import_module(name)
    if _stand_in_torch is None:
        _stand_in_torch = _torch_stand_in()
        _patch_tensor_methods()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _stand_in_torch  # type: ignore[attr-defined]
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = _get_rng_state  # type: ignore[attr-defined]
    random._set_cuda_rng_state = _set_rng_state  # type: ignore[attr-defined]
    experts = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(experts, "te_general_gemm"):
        experts.te_general_gemm = None  # type: ignore[attr-defined]
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = _move_to_host  # type: ignore[attr-defined]
