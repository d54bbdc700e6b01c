"""Metrics to Weights & Biases. Never the reason for a run to fail: it goes on without it.

Files are under `RUN/wandb`; the run's id is kept in `RUN/wandb/run_id`, so that a resumed run goes
on in the same W&B run. `wandb` is imported only when it is used.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from megatron_matpo.config.root import Config
from megatron_matpo.obs.files import write_atomic

INIT_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 60.0
"""The upload of the last lines may take so long; offline it is over at once."""

_log = logging.getLogger(__name__)


Mode = Literal["online", "offline", "disabled"]
_MODES: dict[str, Mode] = {"online": "online", "offline": "offline", "disabled": "disabled"}


def resolve_mode(mode: str) -> Mode:
    """`online | offline | disabled` for `obs.wandb_mode`; `auto` is online only with a key."""
    if mode == "auto":
        return "online" if os.environ.get("WANDB_API_KEY") else "offline"
    return _MODES[mode]


class WandbLog:
    """One W&B run. Every method returns in bounded time and raises nothing."""

    def __init__(self, config: Config, run_dir: str | Path) -> None:
        """Start or resume the W&B run; with `obs.wandb_mode=disabled` do nothing, ever."""
        self._run: Any = None
        self._mode: Mode = resolve_mode(config.obs.wandb_mode)
        if self._mode != "disabled":
            self._guard("start", lambda: self._start(config, Path(run_dir)))

    @property
    def is_active(self) -> bool:
        """Lines are being logged."""
        return self._run is not None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log one step. Steps may repeat after a resume: `step` is a metric, not W&B's counter."""
        if self._run is not None:
            finite = {name: value for name, value in values.items() if math.isfinite(value)}
            self._guard("log", lambda: self._run.log(finite | {"step": step}))

    def close(self) -> None:
        """Finish the run; gives up after `CLOSE_TIMEOUT_S`."""
        run, self._run = self._run, None
        if run is None:
            return
        # `finish` has no deadline of its own. The thread is a daemon: it cannot hold up the exit.
        thread = threading.Thread(
            target=lambda: self._guard("finish", run.finish), name="wandb finish", daemon=True
        )
        thread.start()
        thread.join(CLOSE_TIMEOUT_S)
        if thread.is_alive():
            _log.warning("W&B did not finish in %g s; its files are in RUN/wandb", CLOSE_TIMEOUT_S)

    def _start(self, config: Config, run_dir: Path) -> None:
        import wandb

        id_file = run_dir / "wandb" / "run_id"
        run_id = id_file.read_text().strip() if id_file.exists() else ""
        if not run_id:
            run_id = secrets.token_hex(4)
            write_atomic(id_file, run_id + "\n")
        self._run = wandb.init(
            project=config.obs.wandb_project,
            name=config.run.name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            mode=self._mode,
            config=asdict(config),
            settings=wandb.Settings(
                init_timeout=INIT_TIMEOUT_S,
                console="off",  # the run's logs are files already
                silent=True,
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _guard(self, what: str, action: Callable[[], object]) -> None:
        """Run `action`; after a failure nothing is logged any more, and it is said once."""
        try:
            action()
        # wandb raises many types of its own, and `init` also SystemExit; none may reach training.
        except (Exception, SystemExit) as error:
            self._run = None
            _log.warning("W&B is off for the rest of this run: %s failed: %s", what, error)
