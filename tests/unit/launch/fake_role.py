"""FakeRole: a small real process that stands in for a role of a run.

`python fake_role.py NAME FLAG ...` with exit_after=S, code=N, ignore_term, spawn, fail=TEXT,
run_dir=D, saves=S, once, helper. `helper`: a child in its own session, as a server's worker.
`once`: only its first start ends early. With `saves` it does as a trainer does: S seconds after a
stop is requested it ends well, "stopped".
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_matpo.obs.status import PhaseWriter
from megatron_matpo.obs.stop_request import STOPPED_PHASE, is_stop_requested


def main() -> None:
    name, *flags = sys.argv[1:]
    settings = dict(flag.partition("=")[::2] for flag in flags)
    if "ignore_term" in settings:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "spawn" in settings:
        # A helper in a session of its own that ignores SIGTERM, and whose parent ends at once: the
        # worst case of an orphan.
        helper = [sys.executable, __file__, f"{name}-helper", "ignore_term"]
        launcher = f"import subprocess; subprocess.Popen({helper!r}, start_new_session=True)"
        subprocess.run([sys.executable, "-c", launcher], check=True)
    if "helper" in settings:
        subprocess.Popen([sys.executable, __file__, f"{name}-helper", "ignore_term"])
    print(f"Fake {name} says hello, pid {os.getpid()}", flush=True)
    if "fail" in settings:
        from megatron_matpo.obs.failure import record_failure

        error = ValueError(settings["fail"])
        record_failure(settings["run_dir"], name, 0, "train", error, "Fake traceback")
    mark = Path(settings.get("run_dir", "."), f"{name}-was-here")
    if "once" in settings and mark.exists():
        settings.pop("exit_after")
    elif "once" in settings:
        mark.touch()
    deadline = time.monotonic() + float(settings.get("exit_after", 60))
    while time.monotonic() < deadline:
        time.sleep(0.02)
        if "saves" in settings and is_stop_requested(Path(settings["run_dir"])):
            time.sleep(float(settings["saves"]))
            PhaseWriter(settings["run_dir"], name, 0).set(STOPPED_PHASE)
            os._exit(0)
    code = int(settings.get("code", 0))
    if code:
        print(f"Fake {name} last words", flush=True)
    os._exit(code)


if __name__ == "__main__":
    main()
