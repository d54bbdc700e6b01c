"""What every trainer rank does around its work: status and failure record."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from megatron_matpo.config import Config, load_resolved
from megatron_matpo.errors import DeadlineError
from megatron_matpo.obs.failure import record_failure
from megatron_matpo.obs.spans import record_from_now_on
from megatron_matpo.obs.status import PhaseWriter
from megatron_matpo.obs.step_spans import StepSpans
from megatron_matpo.trainer.clock import Clock

ROLE = "trainer"
_COLLECTIVE_TIMEOUT = re.compile(r"timed out waiting|collective operation timeout", re.IGNORECASE)


def run_rank(work: Callable[[Config, Path, Clock], None]) -> None:
    """Run `work` as one trainer rank (torchrun's environment says which).

    An error is recorded for the supervisor, with the phase in which it happened, and ends the
    process with exit code 1.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", required=True, type=Path)
    run_dir: Path = parser.parse_args().run_dir
    rank = int(os.environ["RANK"])
    spans = StepSpans(run_dir, f"{ROLE}-{rank}")
    record_from_now_on(spans)
    clock = Clock(PhaseWriter(run_dir, ROLE, rank), spans)
    try:
        config = load_resolved(str(run_dir / "config.yaml"))
        spans.trace(config.obs.trace_every)
        work(config, run_dir, clock)
        spans.close()
    except BaseException as error:
        text = traceback.format_exc()
        try:
            record_failure(run_dir, ROLE, rank, clock.current, _named(error), text)
        finally:
            # Even with a full disk. Skips interpreter shutdown: a broken process group could block
            # it for minutes.
            print(text, file=sys.stderr, flush=True)
            spans.close()
            os._exit(1)
    # Everything is written and closed; tearing down torch's modules would only take seconds.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _named(error: BaseException) -> BaseException:
    """A collective that ran into its deadline says which setting holds it; others stay as they are.

    gloo and NCCL report such a timeout as a RuntimeError of their own.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and _COLLECTIVE_TIMEOUT.search(text):
        return DeadlineError(
            f"a collective was not finished in time (train.timeout_s; for the rollout's batch "
            f"rollout.step_timeout_s): {text}"
        )
    return error
