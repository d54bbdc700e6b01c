"""Starts one stock SGLang server: `python serve.py [arguments of sglang serve]`.

Run by file path with the Python of the rollout environment, which has SGLang and does not have
megatron_matpo; so nothing of this package may be imported here. No file of SGLang is changed.

What it does beyond `sglang serve`:

* The engine's key comes from the environment variable MATPO_ENGINE_KEY. SGLang takes keys as
  arguments only, and arguments are visible to every user of the machine; SGLang also logs all of
  its settings, so the key is taken out of that log line.
* The server dies with the process that started it, and its children die with the server.
* On a CPU (SGLANG_USE_CPU_ENGINE=1) two parts of SGLang's CUDA packages are stood in for
  (`_register_torchvision_operators`, `stubs/sgl_kernel`), attention is batched (`attention.py`),
  SGLang's processes are forked, and its weight checker suits a CPU (`_hook_sglang`).

On a GPU SGLang spawns its scheduler and detokenizer. A spawned process imports the main module
again, under another name than `__main__`: what stands above the guard at the end runs in each.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_KEY_VARIABLE = "MATPO_ENGINE_KEY"


def _die_with_parent() -> None:
    """SIGKILL: nothing in a server is worth saving, and its orderly end waits for requests."""
    parent_pid = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def _register_torchvision_operators() -> object:
    """Declare the two operators without which `import torchvision` fails.

    SGLang and transformers import torchvision at module level. Its wheel is built for CUDA: the
    library that defines these operators does not load beside a CPU build of torch. A text model
    never calls them.

    Returns:
        The registration, which lasts as long as this object does.
    """
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _hook_sglang() -> None:
    """Three changes through `HookRegistry`, SGLang's interface for plug-ins.

    The scheduler and the detokenizer start as copies of this process. SGLang spawns them, for
    CUDA's sake; each then imports SGLang again, which is nearly all of the time that a small model
    takes to start (60 s of CPU time against 25 s, on two cores).

    The weight checker's hashes work on a CPU, but it calls `torch.cuda.synchronize` around them,
    which a CPU build of torch refuses. There is nothing to wait for.

    Its hash there is SHA-256, which takes twice as long as the weights need to come over. XXH3 is
    sensitive to every byte and its place too (`weight_sync/checksums.py`: the trainer's side).
    """
    import multiprocessing

    import torch
    import xxhash
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def without_waiting(checksum: Callable[..., object], *args: object, **kwargs: object) -> object:
        original = torch.cuda.synchronize
        torch.cuda.synchronize = lambda device=None: None
        try:
            return checksum(*args, **kwargs)
        finally:
            torch.cuda.synchronize = original

    HookRegistry.register(
        "sglang.srt.utils.weight_checker.WeightChecker._compute_checksum",
        without_waiting,
        HookType.AROUND,
    )

    def xxh3(tensor: torch.Tensor) -> str:
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        return xxhash.xxh3_64_hexdigest(data.data)

    HookRegistry.register("sglang.srt.utils.weight_checker._hash_tensor", xxh3, HookType.REPLACE)

    def use_fork(result: object, *args: object, **kwargs: object) -> None:
        multiprocessing.set_start_method("fork", force=True)

    HookRegistry.register(
        "sglang.srt.entrypoints.engine._set_envs_and_config", use_fork, HookType.AFTER
    )
    HookRegistry.apply_hooks()


class _WithoutSecret(logging.Filter):
    """Replaces the key in log records."""

    def __init__(self, secret: str) -> None:
        super().__init__()
        self._secret = secret

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if self._secret in text:
            record.msg, record.args = text.replace(self._secret, "***"), ()
        return True


def main(argv: list[str]) -> None:
    """Serve until killed. `argv` are SGLang's own arguments, without keys."""
    key = os.environ.pop(_KEY_VARIABLE, "")
    from sglang.srt.entrypoints import engine
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    if key:
        engine.logger.addFilter(_WithoutSecret(key))
        # One key for requests and for control: with an admin key SGLang refuses the other one on
        # control endpoints, and whoever may change the weights may as well generate.
        # One word with "=": a key may begin with a dash.
        argv = [*argv, f"--api-key={key}"]
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        import attention

        attention.register()
        _hook_sglang()
    try:
        launch_server(prepare_server_args(argv))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


_die_with_parent()
if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
    sys.path.insert(0, str(Path(__file__).parent / "stubs"))
    _torchvision_operators = _register_torchvision_operators()

if __name__ == "__main__":
    main(sys.argv[1:])
