"""Python code that nobody vouches for: a fresh process per call, and nothing left of it.

What holds the code, whatever it tries, for root and for any other user alike:

* a seccomp filter (`seccomp.py`): one process with one thread, no network, no signals to others;
* Landlock: it reads Python's own library and what was granted, and writes only into a scratch
  folder that is deleted afterwards;
* hard limits: CPU time, memory, open files, size of a file; and from outside: wall clock, size of
  the scratch folder, output;
* an environment of its own: no variable of the server's.

Neither seccomp nor Landlock needs a privilege or a namespace, which containers and some
distributions take away. Because the code can start no process, killing one process is all that
the end of a call takes. What it does not hide: CPU model, clock, kernel version, load of the
machine, and whether a file exists, with its size and owner (not its content).
"""

from __future__ import annotations

import contextlib
import marshal
import os
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_matpo.mcp_tools.sandbox_child import READY, landlock_version
from megatron_matpo.mcp_tools.scratch import MAX_DEPTH, MAX_ENTRIES, exceeds, remove_tree
from megatron_matpo.mcp_tools.seccomp import build_filter
from megatron_matpo.mcp_tools.stdio import OutageError, Reply

CHILD = Path(__file__).with_name("sandbox_child.py")
_DEVICES = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]
_SYSTEM = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"]
_CLOCK = ["/usr/share/zoneinfo", "/etc/localtime"]
_POLL_S = 0.05
# Between the start of the process and its first byte, on a machine that is busy.
_START_TIMEOUT_S = 30.0
_READ_BYTES = 1 << 16
# Output beyond what is shown is read and dropped up to here; then the code is ended.
_FLOOD_BYTES = 8 << 20
_STDERR_CHARS = 4000
_MIB = 1 << 20
_PROBE = """
import os, socket
held = []
for attempt in (
    lambda: socket.socket(),
    lambda: os.fork(),
    lambda: open(os.environ["HOME"] + "/../probe", "w"),
    lambda: open("/proc/self/environ"),
):
    try:
        attempt()
    except OSError:
        held.append("held")
print(len(held))
"""


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """Per call."""

    cpu_seconds: int = 5
    memory_mb: int = 512
    """Address space."""
    timeout_s: float = 10.0
    """Wall clock."""
    max_output_chars: int = 8000
    max_code_chars: int = 100_000
    file_mb: int = 16
    """One file."""
    scratch_mb: int = 64
    """All files together; looked at twenty times a second."""
    open_files: int = 64


@dataclass(frozen=True, slots=True)
class Isolation:
    """What this machine offers."""

    seccomp: bool
    landlock: int
    """Version, 0 without it."""

    @property
    def missing(self) -> list[str]:
        """What the code could do that it must not; empty if everything holds."""
        risks: list[str] = []
        if not self.seccomp:
            risks.append(
                "no seccomp filter (Linux on x86-64 or arm64): the code can use the network, "
                "start processes and end those of this user"
            )
        if not self.landlock:
            risks.append(
                "no Landlock (Linux 5.13 or newer with the module enabled): the code can read all "
                "that this user can read"
                + ("" if self.seccomp else " and write all that this user can write")
            )
        return risks


def find_isolation() -> Isolation:
    """Ask the kernel."""
    if sys.platform != "linux":
        return Isolation(seccomp=False, landlock=0)
    with contextlib.suppress(OSError):
        actions = Path("/proc/sys/kernel/seccomp/actions_avail").read_text().split()
        if "errno" not in actions:
            return Isolation(seccomp=False, landlock=landlock_version())
    return Isolation(build_filter(may_write=True) is not None, landlock_version())


class _Stream:
    """What a pipe brought, as far as it is shown."""

    def __init__(self, max_bytes: int, keeps_end: bool) -> None:
        self._max_bytes = max_bytes
        self._keeps_end = keeps_end
        self.data = bytearray()
        self.num_bytes = 0

    def add(self, chunk: bytes) -> None:
        self.num_bytes += len(chunk)
        self.data += chunk
        if len(self.data) > self._max_bytes:
            if self._keeps_end:
                del self.data[: -self._max_bytes]
            else:
                del self.data[self._max_bytes :]

    def text(self, max_chars: int) -> str:
        text = bytes(self.data).decode("utf-8", "replace").rstrip()
        if len(text) <= max_chars and self.num_bytes <= self._max_bytes:
            return text
        if self._keeps_end:
            return f"[... cut: the last {max_chars} characters are shown]\n{text[-max_chars:]}"
        return f"{text[:max_chars]}\n[... cut: the first {max_chars} characters are shown]"


class Sandbox:
    """Runs code; calls from several threads do not disturb each other."""

    def __init__(
        self, limits: SandboxLimits, isolation: Isolation, readable: Sequence[str] = ()
    ) -> None:
        """`readable` are further folders and files that code may read, and import from."""
        self._limits = limits
        self._isolation = isolation
        self._readable = [str(Path(path).resolve()) for path in readable]
        program = build_filter(may_write=isolation.landlock > 0) if isolation.seccomp else None
        self._program = program or b""
        self._folder = tempfile.mkdtemp(prefix="matpo-sandbox-")
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._is_closed = False

    def close(self) -> None:
        """End what runs and delete the folder; on return nothing is left."""
        with self._lock:
            self._is_closed = True
            running = list(self._running)
        for process in running:
            end_group(process)
        remove_tree(self._folder)

    def check(self) -> str:
        """Run a probe in the sandbox itself; empty, or what does not hold."""
        reply = self.run(_PROBE)
        if self._isolation.missing or reply.text == "4":
            return ""
        return f"the sandbox does not hold: of 4 forbidden things, it refused {reply.text!r}"

    def run(self, code: str) -> Reply:
        """Run `code` to its end or to a limit.

        Raises:
            OutageError: the sandbox could not be set up; says nothing about the code.
        """
        limits = self._limits
        if len(code) > limits.max_code_chars:
            return Reply(
                f"Error: the code has {len(code)} characters, at most {limits.max_code_chars} may "
                "be run",
                is_error=True,
            )
        try:
            scratch = tempfile.mkdtemp(dir=self._folder)
        except OSError as error:
            raise OutageError(f"no scratch folder: {error}") from error
        try:
            with self._lock:
                if self._is_closed:
                    raise OutageError("the sandbox was closed")
                process = self._start(scratch)
                self._running.add(process)
            try:
                self._send(process, code, scratch)
                return _Call(limits, process, scratch).finish()
            finally:
                self._running.discard(process)
        finally:
            remove_tree(scratch)

    def _start(self, scratch: str) -> subprocess.Popen[bytes]:
        # -S and -P: nothing but the standard library can be imported; -B: nothing is written to it.
        command = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(CHILD)]
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=scratch,
                env=_environment(scratch),
                start_new_session=True,
            )
        except OSError as error:
            raise OutageError(f"no process: {error}") from error

    def _send(self, process: subprocess.Popen[bytes], code: str, scratch: str) -> None:
        """Hand the job over. The process reads all of it before it writes anything."""
        limits = self._limits
        job = {
            "code": code,
            "parent": os.getpid(),
            "limits": {
                "cpu_seconds": limits.cpu_seconds,
                "memory_bytes": limits.memory_mb * _MIB,
                "file_bytes": limits.file_mb * _MIB,
                "open_files": limits.open_files,
            },
            "landlock": self._isolation.landlock > 0,
            "seccomp": self._program,
            "scratch": scratch,
            "devices": _DEVICES,
            "readable": [*runtime_paths(), *self._readable],
            "import_from": self._readable,
        }
        assert process.stdin is not None
        # If it died, its stderr says why.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(marshal.dumps(job))
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


class _Call:
    """One running process, its output and its limits."""

    def __init__(
        self, limits: SandboxLimits, process: subprocess.Popen[bytes], scratch: str
    ) -> None:
        self._limits = limits
        self._process = process
        self._scratch = scratch
        self._stdout = _Stream(4 * limits.max_output_chars, keeps_end=False)
        self._stderr = _Stream(4 * _STDERR_CHARS, keeps_end=True)
        self._is_ready = False
        self._next_look = time.monotonic()
        self._deadline = self._next_look + _START_TIMEOUT_S

    def finish(self) -> Reply:
        """Wait for the end, or bring it about."""
        assert self._process.stdout is not None and self._process.stderr is not None
        reason = ""
        try:
            with selectors.DefaultSelector() as selector:
                for pipe in (self._process.stdout, self._process.stderr):
                    os.set_blocking(pipe.fileno(), False)
                    selector.register(pipe, selectors.EVENT_READ)
                while not reason and not self._is_over(selector):
                    reason = self._violation()
        finally:
            end_group(self._process)
            self._process.stdout.close()
            self._process.stderr.close()
        if not self._is_ready:
            said = self._stderr.text(500) or reason or f"exit code {self._process.returncode}"
            raise OutageError(f"the sandbox could not be set up: {said}")
        return self._reply(reason)

    def _is_over(self, selector: selectors.BaseSelector) -> bool:
        """Read what there is; true when the process has ended and all is read."""
        pipes = selector.get_map()
        if not pipes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_POLL_S)
            return self._process.poll() is not None
        has_ended = self._process.poll() is not None
        events = selector.select(0 if has_ended else _POLL_S)
        for key, _ in events:
            chunk = os.read(key.fd, _READ_BYTES)
            if not chunk:
                selector.unregister(key.fileobj)
            elif key.fileobj is self._process.stdout:
                self._stdout.add(chunk)
            else:
                self._add_error(chunk)
        return has_ended and not events

    def _add_error(self, chunk: bytes) -> None:
        self._stderr.add(chunk)
        if not self._is_ready and READY in self._stderr.data:
            self._is_ready = True
            self._deadline = time.monotonic() + self._limits.timeout_s
            # What comes before it is the interpreter's own: warnings about its surroundings.
            del self._stderr.data[: self._stderr.data.index(READY) + len(READY)]

    def _violation(self) -> str:
        """Why the process has to be ended now; empty if it may go on."""
        now = time.monotonic()
        if now >= self._deadline:
            limit = self._limits.timeout_s if self._is_ready else _START_TIMEOUT_S
            return f"it ran for more than {limit:g} s"
        if self._stdout.num_bytes + self._stderr.num_bytes > _FLOOD_BYTES:
            return f"it printed more than {_FLOOD_BYTES // _MIB} MiB"
        if now < self._next_look:
            return ""
        self._next_look = now + _POLL_S
        if exceeds(self._scratch, self._limits.scratch_mb * _MIB):
            return (
                f"its files take more than {self._limits.scratch_mb} MiB, are more than "
                f"{MAX_ENTRIES}, or are nested deeper than {MAX_DEPTH} folders"
            )
        return ""

    def _reply(self, reason: str) -> Reply:
        code = self._process.returncode
        if not reason and code < 0:
            reason = _signal_reason(-code, self._limits)
        parts = [
            self._stdout.text(self._limits.max_output_chars),
            self._stderr.text(_STDERR_CHARS),
        ]
        if reason:
            parts.append(f"Error: the code was ended: {reason}")
        elif code and not parts[1]:
            parts.append(f"Error: the code ended with exit code {code}")
        text = "\n".join(part for part in parts if part)
        is_error = bool(reason) or code != 0
        return Reply(text or "(no output: print what you want to see)", is_error)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its group (without the filter, the code may have started others)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _signal_reason(number: int, limits: SandboxLimits) -> str:
    if number == signal.SIGXCPU:
        return f"it used more than {limits.cpu_seconds} s of CPU time"
    if number == signal.SIGKILL:
        return (
            f"it used more than {limits.cpu_seconds} s of CPU time, or the machine ran out of "
            "memory"
        )
    try:
        return f"it crashed ({signal.Signals(number).name})"
    except ValueError:
        return f"it crashed (signal {number})"


def runtime_paths() -> list[str]:
    """What Python needs to import its standard library."""
    own = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    return [*sorted(own), str(Path(sys.base_prefix) / "lib"), *_SYSTEM, *_CLOCK]


def _environment(scratch: str) -> dict[str, str]:
    return {
        "HOME": scratch,
        "TMPDIR": scratch,
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        # Sets are printed in the same order every time.
        "PYTHONHASHSEED": "0",
        # Libraries that would start threads, which they may not.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
