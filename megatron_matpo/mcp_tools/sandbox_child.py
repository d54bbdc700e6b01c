"""Runs one piece of code under restrictions: the process that `python_sandbox` starts per call.

A script, not a module: it is run by path, with nothing but the standard library, of which it
imports as little as it can, because that is most of what a call costs. It reads a job (`marshal`,
from the same interpreter) from stdin, gives up every right that the code must not have, writes
`READY` to stderr, and runs the code. Nothing that it gave up can be taken back: no privilege is
left, the limits are hard, and neither Landlock nor seccomp has a way back.

Like a notebook, the value of a last line that is an expression is printed. A failure is printed as
a traceback without the lines of this file, with exit code 1.
"""

from __future__ import annotations

import _ast
import builtins
import ctypes
import marshal
import os
import resource
import signal
import struct
import sys

READY = b"\x06"
"""First byte on stderr: all restrictions hold and the code is next."""
FILE = "<code>"

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_RULE_PATH = 1

# Landlock's rights to files: 0 execute, 1 write, 2 read, 3 list a folder, 4-12 remove and make,
# 13 move between folders, 14 truncate, 15 ioctl on devices; the last three came with versions 2, 3
# and 5.
_ALL_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_NEWEST_RIGHTS = (1 << 16) - 1
_READ_FILE, _WRITE_FILE = 1 << 2, 1 << 1
_READ_FOLDER = 1 | _READ_FILE | 1 << 3
_FILE_RIGHTS = 0b111 | 1 << 14 | 1 << 15
# What a scratch folder is for: all but device files, sockets and running programs.
_SCRATCH_RIGHTS = _NEWEST_RIGHTS & ~(1 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 15)
_NO_NETWORK = 0b11
_NO_SCOPE = 0b11

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """The kernel's version of Landlock, 0 without it."""
    return max(0, _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def _check(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def _prctl(option: int, *arguments: int | ctypes.c_char_p) -> None:
    longs = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    padding = [ctypes.c_ulong(0)] * (4 - len(longs))
    _check(_libc.prctl(option, *longs, *padding), f"prctl({option})")


def set_limits(limits: dict[str, int]) -> None:
    """Hard limits; the soft CPU limit comes first, so that its signal tells what happened."""
    cpu = limits["cpu_seconds"]
    for kind, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CORE, 0),
        # Does not count for root; the filter refuses new processes and threads of anyone.
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))


def drop_privileges() -> None:
    """No capability is left, also for root; needs no_new_privs against getting them back."""
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, bytes(24)), "capset")


def restrict_files(readable: list[str], devices: list[str], scratch: str) -> None:
    """Landlock: read `readable`, use `devices`, write below `scratch`; nothing else.

    Raises:
        OSError: the kernel has no Landlock, or refuses.
    """
    version = landlock_version()
    if not version:
        raise OSError("the kernel has no Landlock")
    handled = _ALL_RIGHTS.get(version, _NEWEST_RIGHTS)
    # Fields were added over time, and a kernel refuses those that it does not know.
    attributes = struct.pack("<QQQ", handled, _NO_NETWORK, _NO_SCOPE)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = _check(
        _libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0)),
        "landlock_create_ruleset",
    )
    for path in readable:
        _allow(rules, path, _READ_FOLDER & handled)
    for path in devices:
        _allow(rules, path, (_READ_FILE | _WRITE_FILE) & handled)
    _allow(rules, scratch, _SCRATCH_RIGHTS & handled)
    _check(_libc.syscall(_LANDLOCK_RESTRICT, rules, ctypes.c_uint32(0)), "landlock_restrict_self")
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not every machine has every folder; what is not there need not be read
    try:
        if not os.path.isdir(path):
            rights &= _FILE_RIGHTS
        rule = struct.pack("<Qi", rights, handle)
        _check(
            _libc.syscall(_LANDLOCK_ADD, rules, _LANDLOCK_RULE_PATH, rule, ctypes.c_uint32(0)),
            f"landlock_add_rule({path})",
        )
    finally:
        os.close(handle)


def restrict_calls(program: bytes) -> None:
    """Install a seccomp filter (`struct sock_filter[]`)."""
    buffer = ctypes.create_string_buffer(program, len(program))
    pointer = ctypes.cast(buffer, ctypes.c_void_p).value or 0
    header = struct.pack("@HP", len(program) // 8, pointer)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(header))


def lock(job: dict) -> None:
    """Give up everything that the job does not grant.

    Raises:
        OSError: a restriction that was asked for cannot be had; the code must not run.
    """
    set_limits(job["limits"])
    if sys.platform != "linux":
        return  # only where the server was told to go on without isolation
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != job["parent"]:
        raise OSError("the server is gone")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    drop_privileges()
    if job["landlock"]:
        restrict_files(job["readable"], job["devices"], job["scratch"])
    if job["seccomp"]:
        restrict_calls(job["seccomp"])


def run(code: str, import_from: list[str]) -> None:
    """Run `code` as `__main__`; print the value of a last line that is an expression."""
    sys.path += import_from
    tree = compile(code, FILE, "exec", _ast.PyCF_ONLY_AST)
    assert isinstance(tree, _ast.Module)
    last = tree.body[-1] if tree.body else None
    value: _ast.Expression | None = None
    if isinstance(last, _ast.Expr):
        tree.body.pop()
        value = _ast.Expression(last.value)
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    names = module.__dict__
    exec(compile(tree, FILE, "exec"), names)
    if value is not None:
        result = eval(compile(value, FILE, "eval"), names)
        if result is not None:
            print(repr(result))


def report(error: BaseException, code: str) -> int:
    """Print the traceback without frames of this file; the exit code."""
    if isinstance(error, MemoryError):
        _free(error)
    import linecache
    import traceback

    linecache.cache[FILE] = (len(code), None, code.splitlines(keepends=True), FILE)
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != FILE:
        frames = frames.tb_next
    lines = traceback.format_exception(type(error), error, frames)
    if frames is None:  # it does not even compile
        lines = traceback.format_exception_only(type(error), error)
    sys.stderr.write("".join(lines))
    return 1


def _free(error: BaseException) -> None:
    """Let go of what the code holds: the memory is needed to say that it ran out."""
    sys.modules["__main__"].__dict__.clear()
    frames = error.__traceback__
    while frames is not None:
        if frames.tb_frame.f_code.co_filename == FILE:
            frames.tb_frame.clear()
        frames = frames.tb_next


def main() -> None:
    """Entry; ends the process without clean-up that the code could have left behind."""
    job = marshal.load(sys.stdin.buffer)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    lock(job)
    os.write(2, READY)
    builtins.exit = builtins.quit = sys.exit  # `site` defines them, and is left out
    status = 1
    try:
        run(job["code"], job["import_from"])
        status = 0
    except BaseException as error:
        status = report(error, job["code"])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            status = status or 1
    os._exit(status)


if __name__ == "__main__":
    main()
