"""What code in the sandbox cannot do, tried in real processes under the real kernel.

Proven: the network, other processes, files outside and the limits themselves are out of its reach,
for root and for a user without rights. Not proven: that the kernel's own checks have no holes.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_matpo.mcp_tools import python_sandbox
from megatron_matpo.mcp_tools.python_sandbox import (
    Isolation,
    Sandbox,
    SandboxLimits,
    find_isolation,
)
from megatron_matpo.mcp_tools.stdio import Reply

pytestmark = pytest.mark.skipif(
    bool(find_isolation().missing), reason="; ".join(find_isolation().missing)
)
LIMITS = SandboxLimits(cpu_seconds=5, timeout_s=20.0, memory_mb=256)


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    sandbox = Sandbox(LIMITS, find_isolation())
    yield sandbox
    sandbox.close()


def refused(reply: Reply) -> None:
    """The kernel said no, and the code's own traceback says so."""
    assert reply.is_error, reply.text
    last = reply.text.splitlines()[-1]
    assert last.startswith(("PermissionError", "RuntimeError: can't start", "OSError")), reply.text


def test_no_network_of_any_kind(box: Sandbox) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        port = server.getsockname()[1]
        refused(box.run(f"import socket; socket.create_connection(('127.0.0.1', {port}))"))
        reply = box.run(f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}')")
        assert "Operation not permitted" in reply.text
        for family in ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_VSOCK", "AF_ALG"):
            refused(box.run(f"import socket; socket.socket(socket.{family}, socket.SOCK_RAW)"))
        refused(box.run("import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)"))
        with pytest.raises(TimeoutError):
            server.accept()


RAW_CALLS = {
    # name: number on x86-64, arguments; io_uring_setup would get round a filter of socket calls.
    "io_uring_setup": (425, 1, 0),
    "clone3": (435, 0, 0),
    "pidfd_open": (434, 1, 0),
    "memfd_create": (319, 0, 0),
    "ptrace": (101, 16, 1),
    "unshare": (272, 0x10000000, 0),
    "keyctl": (250, 0, 0),
    "bpf": (321, 0, 0),
    "execveat": (322, 0, 0),
    "prctl": (157, 1, 0),
    "a call of the future": (500, 0, 0),
    "an x32 call": (0x40000000 + 41, 2, 1),
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86-64")
@pytest.mark.parametrize("name", RAW_CALLS)
def test_calls_below_the_library_are_refused_too(box: Sandbox, name: str) -> None:
    number, first, second = RAW_CALLS[name]
    reply = box.run(
        "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"print(libc.syscall(ctypes.c_long({number}), {first}, {second}, 0, 0, 0))\n"
        "print(errno.errorcode[ctypes.get_errno()])"
    )
    assert reply.text in ("-1\nEPERM", "-1\nENOSYS"), reply.text


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.setsid()",
        "import os; os.setpgid(0, 0)",
        "import threading; threading.Thread(target=print).start()",
        "import multiprocessing as m; m.Process(target=print).start()",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
    ],
)
def test_no_process_and_no_thread_can_be_started(box: Sandbox, code: str) -> None:
    refused(box.run(code))


def test_a_fork_bomb_is_one_process_and_leaves_none(box: Sandbox) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    code = """
import os
failed = 0
for _ in range(1000):
    try:
        if os.fork() == 0:
            os.setsid()
            os.fork()
    except OSError:
        failed += 1
print(failed)
"""
    assert box.run(code) == Reply("1000")
    assert {process.pid for process in psutil.Process().children(recursive=True)} == before


def test_other_processes_are_out_of_reach(box: Sandbox) -> None:
    me = os.getpid()
    refused(box.run(f"import os, signal; os.kill({me}, 0)"))
    refused(box.run("import os, signal; os.kill(-1, signal.SIGKILL)"))
    refused(box.run("import os, signal; os.killpg(0, signal.SIGTERM)"))
    refused(box.run(f"import resource; resource.prlimit({me}, resource.RLIMIT_NOFILE)"))
    refused(box.run(f"import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, {me})"))
    refused(box.run(f"open('/proc/{me}/environ').read()"))
    refused(box.run(f"open('/proc/{me}/mem', 'r+b')"))
    refused(box.run(f"import os; os.sched_setaffinity({me}, {{0}})"))
    refused(box.run("import os; os.nice(-1)"))


def test_limits_cannot_be_raised_again(box: Sandbox) -> None:
    for kind in ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_NOFILE", "RLIMIT_FSIZE"):
        reply = box.run(
            f"import resource as r\nr.setrlimit(r.{kind}, (r.RLIM_INFINITY, r.RLIM_INFINITY))"
        )
        assert reply.is_error and "not allowed to raise maximum limit" in reply.text


@pytest.mark.parametrize(
    "attempt",
    [
        "open({outside!r} + '/new', 'w')",
        "open({secret!r}, 'a')",
        "open({secret!r}).read()",
        "import os; os.truncate({secret!r}, 0)",
        "import os; os.unlink({secret!r})",
        "import os; os.rename({secret!r}, 'mine')",
        "import os; os.link({secret!r}, 'mine')",
        "import os; os.mkdir({outside!r} + '/new')",
        "import os; os.rmdir({empty!r})",
        "import os; os.symlink('x', {outside!r} + '/new')",
        "import os; os.symlink({secret!r}, 'link'); open('link').read()",
        "import os; os.symlink({secret!r}, 'link'); open('link', 'w')",
        "import os; os.listdir({outside!r})",
        "import os; os.chown({secret!r}, 1, 1)",
        "import os; os.setxattr({secret!r}, 'user.x', b'1')",
        "import os; os.mkfifo({outside!r} + '/new')",
        "import sqlite3; sqlite3.connect({outside!r} + '/new').execute('create table t(a)')",
        "open(os.__file__, 'a')",
        "open('/dev/shm/new', 'w')",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "open('/dev/tty', 'w')",
    ],
)
def test_files_outside_are_out_of_reach(box: Sandbox, tmp_path: Path, attempt: str) -> None:
    secret, empty = tmp_path / "secret", tmp_path / "empty"
    secret.write_text("the answer")
    empty.mkdir()
    code = "import os\n" + attempt.format(
        outside=str(tmp_path), secret=str(secret), empty=str(empty)
    )
    reply = box.run(code)
    assert reply.is_error, reply.text
    assert "the answer" not in reply.text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "secret"]
    assert secret.read_text() == "the answer"


def test_modes_and_times_outside_do_not_change(box: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the answer")
    before = secret.stat()
    code = f"import os\nos.chmod({str(secret)!r}, 0)\nos.utime({str(secret)!r}, (0, 0))\nprint(1)"
    assert box.run(code) == Reply("1"), "they seem to succeed, for those who copy files"
    after = secret.stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_without_landlock_nothing_can_be_written_at_all(tmp_path: Path) -> None:
    """A kernel without it is played by not asking for it; the filter is the real one."""
    (tmp_path / "open").write_text("readable")
    sandbox = Sandbox(LIMITS, Isolation(seccomp=True, landlock=0))
    try:
        assert sandbox.check() == ""
        for attempt in ("open('x', 'w')", "open('x', 'a')", "os.mkdir('x')", "os.unlink('x')"):
            refused(sandbox.run(f"import os; {attempt}"))
        refused(sandbox.run(f"import os; os.rename({str(tmp_path / 'open')!r}, 'x')"))
        assert sandbox.run(f"open({str(tmp_path / 'open')!r}).read()") == Reply("'readable'")
    finally:
        sandbox.close()
    (risk,) = Isolation(seccomp=True, landlock=0).missing
    assert "can read all that this user can read" in risk and "write" not in risk


def _python_for_everybody() -> str | None:
    """An interpreter that a user without rights can start."""
    for candidate in (sys.executable, "/usr/bin/python3"):
        command = [candidate, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        try:
            done = subprocess.run(command, user="nobody", check=False, capture_output=True)
        except (OSError, subprocess.SubprocessError):
            continue
        if done.returncode == 0:
            return candidate
    return None


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests run as a normal user already")
def test_it_holds_for_a_user_without_rights_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    python = _python_for_everybody()
    if python is None:
        pytest.skip("no Python 3.11 that another user may start")
    package = Path(python_sandbox.__file__).parents[1]
    folder = Path("/tmp") / f"matpo-test-{os.getpid()}"
    try:
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("*.pyc"))
        subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
        code = (
            "from megatron_matpo.mcp_tools.python_sandbox import *\n"
            "box = Sandbox(SandboxLimits(), find_isolation())\n"
            "print([box.check(), box.run('6 * 7').text, box.run('import os; os.fork()').is_error,\n"
            "       box.run('open(\"/etc/passwd\").read()').is_error])\n"
            "box.close()"
        )
        nobody = pwd.getpwnam("nobody").pw_uid
        done = subprocess.run(
            [python, "-c", code],
            user=nobody,
            group=pwd.getpwnam("nobody").pw_gid,
            extra_groups=[],
            env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert done.stdout.strip() == "['', '42', True, True]", done.stderr
