"""Two processes that watch each other, so that a killed supervisor leaves nothing behind.

The command forks at once: the parent (guard) only waits, the child supervises the run.

* The guard dies: the kernel sends the supervisor SIGTERM, and it stops the run in order.
* The supervisor dies: its descendants become the guard's, which stops them all.

The supervisor has a session of its own: a SIGKILL of the terminal's process group cannot take both.
The guard passes the signals of `launch.stopping` on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from megatron_matpo.errors import MatpoError
from megatron_matpo.launch.process import become_subreaper, die_with_parent, stop_all
from megatron_matpo.launch.stopping import SIGNALS


def run_guarded(supervise: Callable[[], int], grace_s: float) -> int:
    """Run `supervise` in a forked child and return the exit code of the whole.

    Must be called before any thread exists. `grace_s` is how long descendants may take to stop
    (seconds) if the supervisor itself was killed.
    """
    become_subreaper()
    sys.stdout.flush()
    sys.stderr.flush()
    guard_pid = os.getpid()
    # Blocked until both sides have their handlers: no signal falls between fork and handler.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    supervisor_pid = os.fork()
    if supervisor_pid == 0:
        _be_supervisor(supervise, guard_pid)

    def pass_on(signal_number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):  # it may have ended just now
            os.kill(supervisor_pid, signal_number)

    for number in SIGNALS:
        # Under nohup SIGHUP is ignored, and stays so.
        if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:
            signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    _, status = os.waitpid(supervisor_pid, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        name = signal.Signals(-code).name
        print(f"the supervisor was ended by {name}; stopping its processes", file=sys.stderr)
    stop_all([], grace_s)
    return code if code >= 0 else 128 - code


def _be_supervisor(supervise: Callable[[], int], guard_pid: int) -> None:
    """The child's side; never returns into the guard's code."""
    code = 1
    try:
        os.setsid()
        die_with_parent(guard_pid)
        become_subreaper()
        code = supervise()
    except MatpoError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
