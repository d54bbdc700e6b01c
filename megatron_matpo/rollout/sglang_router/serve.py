"""Starts SGLang's router without workers: `PYTHON serve.py HOST PORT METRICS_PORT PARENT`.

Runs in the rollout environment and imports nothing of this project. `sglang_router.launch_router`
would import all of SGLang. The key that clients have to show, and that engines ask for, comes in
MATPO_ENGINE_KEY; workers come through `POST /workers`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until killed, or until the parent ends."""
    host, port, metrics_port, parent = sys.argv[1], *map(int, sys.argv[2:5])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)
    from sglang_router.router import Router  # pyright: ignore[reportMissingImports]
    from sglang_router.router_args import RouterArgs  # pyright: ignore[reportMissingImports]

    arguments = RouterArgs(
        host=host,
        port=port,
        policy="cache_aware",
        api_key=os.environ["MATPO_ENGINE_KEY"],
        # A generation is repeated by whoever knows what was sampled of it.
        disable_retries=True,
        # Which engines get requests is the fleet's word.
        disable_health_check=True,
        disable_circuit_breaker=True,
        worker_startup_check_interval=1,
        worker_startup_timeout_secs=30,
        request_timeout_secs=24 * 3600,
        prometheus_host=host,
        prometheus_port=metrics_port,
        log_level="warn",
    )
    Router.from_args(arguments).start()


if __name__ == "__main__":
    main()
