"""Calls of the sandbox, in real processes: replies, limits, and that nothing is left of them.

What code cannot do is proven in test_sandbox_child.py.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from megatron_matpo.mcp_tools.python_sandbox import (
    Isolation,
    Sandbox,
    SandboxLimits,
    find_isolation,
)
from megatron_matpo.mcp_tools.scratch import MAX_DEPTH, MAX_ENTRIES
from megatron_matpo.mcp_tools.stdio import OutageError, Reply

pytestmark = pytest.mark.skipif(
    bool(find_isolation().missing), reason="; ".join(find_isolation().missing)
)
QUICK = SandboxLimits(cpu_seconds=5, timeout_s=20.0, memory_mb=256)


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    sandbox = Sandbox(QUICK, find_isolation())
    yield sandbox
    sandbox.close()


def make(limits: SandboxLimits, isolation: Isolation | None = None, **more: object) -> Sandbox:
    return Sandbox(limits, isolation or find_isolation(), **more)  # type: ignore[arg-type]


def test_what_is_printed_and_the_value_of_the_last_line_come_back(box: Sandbox) -> None:
    assert box.run("print(12 * 7)") == Reply("84")
    assert box.run("x = 12\nx * 7") == Reply("84")
    assert box.run("'a'\nNone") == Reply("(no output: print what you want to see)")
    assert box.run("print('é 🎉')\n'\\udc80'") == Reply("é 🎉\n'\\udc80'")
    assert box.run("class A: pass\nA.__module__, __name__") == Reply("('__main__', '__main__')")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print(1)\n1 / 0", "1\nTraceback (most recent call last):\n"),
        ("1 / 0", '  File "<code>", line 1, in <module>\n    1 / 0\n'),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("print(12 * 7", "SyntaxError: '(' was never closed"),
        ("x = '\\0'\nexec(x)", "SyntaxError: source code string cannot contain null bytes"),
        ("\0", "null bytes"),
        ("import sys; sys.exit(3)", "Error: the code ended with exit code 3"),
        ("exit('out of ideas')", "out of ideas"),
        ("def f(n): return f(n)\nf(0)", "RecursionError"),
        ("input()", "EOFError"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("import megatron_matpo", "ModuleNotFoundError"),
        ("import ctypes; ctypes.string_at(0)", "Error: the code was ended: it crashed (SIGSEGV)"),
        ("import os; os._exit(125)", "Error: the code ended with exit code 125"),
    ],
)
def test_failures_are_error_replies(box: Sandbox, code: str, said: str) -> None:
    reply = box.run(code)
    assert reply.is_error
    assert said in reply.text
    assert "sandbox_child" not in reply.text, "only the code's own lines"


def test_the_standard_library_works(box: Sandbox) -> None:
    code = """
import asyncio, datetime, decimal, fractions, json, random, re, shutil, sqlite3, statistics
import tempfile, zoneinfo, hashlib
async def nap():
    await asyncio.sleep(0.01)
    return 1
with tempfile.NamedTemporaryFile("w", delete=False) as file:
    file.write("kept")
shutil.copy2(file.name, "copy")
print(asyncio.run(nap()), open("copy").read(), decimal.Decimal(1) / 8, fractions.Fraction(1, 3))
print(sqlite3.connect("x.db").execute("select 1").fetchone(), hashlib.sha256(b"a").hexdigest()[:4])
print(datetime.datetime(2020, 7, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Paris")).utcoffset())
"""
    assert box.run(code) == Reply("1 kept 0.125 1/3\n(1,) ca97\n2:00:00")


def test_sets_are_in_the_same_order_every_time(box: Sandbox) -> None:
    code = "list({str(i) for i in range(20)})"
    assert len({box.run(code).text for _ in range(3)}) == 1


def test_each_call_starts_afresh(box: Sandbox) -> None:
    assert box.run("open('note', 'w').write('x'); import os; os.listdir()") == Reply("['note']")
    assert box.run("import os; os.listdir()") == Reply("[]")


def test_nothing_of_the_environment_comes_in(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERPER_API_KEY", "hunter2")
    reply = box.run("import os; print(dict(os.environ)); print(os.getcwd() == os.environ['HOME'])")
    assert "hunter2" not in reply.text and "SERPER" not in reply.text
    assert reply.text.endswith("True")


def test_what_is_granted_can_be_read_and_imported_but_not_written(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("VALUE = 42\n")
    sandbox = make(QUICK, readable=[str(tmp_path)])
    try:
        assert sandbox.run("import helper; helper.VALUE") == Reply("42")
        reply = sandbox.run(f"open({str(tmp_path / 'helper.py')!r}, 'w')")
        assert reply.is_error and "PermissionError" in reply.text
    finally:
        sandbox.close()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("while True: pass", "it used more than 1 s of CPU time"),
        ("import signal\nsignal.signal(signal.SIGXCPU, print)\nwhile 1: pass", "1 s of CPU time"),
        ("import time; time.sleep(60)", "it ran for more than 3 s"),
        ("import signal, time\nsignal.signal(15, print)\ntime.sleep(60)", "more than 3 s"),
        ("import os, time; os.close(1); os.close(2); time.sleep(60)", "more than 3 s"),
        ("while True: print('x' * 1000)", "it printed more than 8 MiB"),
        ("x = []\nwhile True: x.append('a' * 10**6)", "MemoryError"),
        ("bytearray(10**12)", "MemoryError"),
        ("f = [open(f'f{i}', 'w') for i in range(100)]", "Too many open files"),
        ("open('big', 'wb').write(bytes(3 << 20))", "File too large"),
        ("import os\nwhile True: os.mkdir('d'); os.chdir('d')", f"deeper than {MAX_DEPTH}"),
        ("n = 0\nwhile True: open(str(n), 'w'); n += 1", f"more than {MAX_ENTRIES}"),
        (
            "import time\nfor i in range(9): open(str(i), 'wb').write(bytes(1 << 20)); "
            "time.sleep(0.1)",
            "its files take more than 4 MiB",
        ),
    ],
)
def test_every_limit_ends_the_code(code: str, said: str) -> None:
    limits = SandboxLimits(
        cpu_seconds=1,
        # CPU time passes slowly on a machine that is busy.
        timeout_s=60.0 if "CPU" in said else 3.0,
        memory_mb=128,
        file_mb=2,
        scratch_mb=4,
        open_files=32,
    )
    sandbox = make(limits)
    try:
        reply = sandbox.run(code)
        assert reply.is_error and said in reply.text, reply.text
        assert os.listdir(sandbox._folder) == [], "the scratch folder is gone"
    finally:
        sandbox.close()


def test_long_output_is_cut_with_a_mark_and_the_traceback_survives() -> None:
    sandbox = make(SandboxLimits(max_output_chars=100))
    try:
        reply = sandbox.run("print('é' * 1000)\n1 / 0")
    finally:
        sandbox.close()
    head, mark, rest = reply.text.split("\n", 2)
    assert head == "é" * 100
    assert mark == "[... cut: the first 100 characters are shown]"
    assert rest.endswith("ZeroDivisionError: division by zero")


def test_code_that_is_too_long_is_refused() -> None:
    sandbox = make(SandboxLimits(max_code_chars=10))
    try:
        reply = sandbox.run("print('x')  # eleven")
        assert reply.is_error and "at most 10 may be run" in reply.text
    finally:
        sandbox.close()


def test_calls_at_the_same_time_do_not_meet(box: Sandbox) -> None:
    code = "open('n', 'w').write('{0}')\nimport time; time.sleep(0.05)\nprint(open('n').read())"
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda n: box.run(code.format(n)), range(24)))
    assert [reply.text for reply in replies] == [str(n) for n in range(24)]


def test_nothing_is_left_of_many_calls(box: Sandbox) -> None:
    box.run("1")
    handles, before = psutil.Process().num_fds(), set(psutil.Process().children(recursive=True))
    for code in ("1", "1 / 0", "import os; os._exit(9)", "import ctypes; ctypes.string_at(0)"):
        for _ in range(5):
            box.run(code)
    assert psutil.Process().num_fds() == handles
    assert os.listdir(box._folder) == []
    assert set(psutil.Process().children(recursive=True)) == before


def test_closing_ends_what_runs() -> None:
    sandbox = make(SandboxLimits(timeout_s=60))
    before = set(psutil.Process().children())
    replies: list[Reply] = []
    thread = threading.Thread(
        target=lambda: replies.append(sandbox.run("import time; print(1); time.sleep(50)"))
    )
    thread.start()
    while not (children := set(psutil.Process().children()) - before):
        time.sleep(0.01)
    time.sleep(0.3)
    sandbox.close()
    thread.join(10)
    assert not thread.is_alive()
    assert not any(child.is_running() for child in children)
    assert not Path(sandbox._folder).exists()
    with pytest.raises(OutageError):
        sandbox.run("1")


def test_a_sandbox_that_cannot_be_set_up_is_an_outage_and_no_reply() -> None:
    sandbox = make(QUICK)
    sandbox._program = bytes(8)  # the kernel takes no such filter
    try:
        with pytest.raises(OutageError, match="could not be set up"):
            sandbox.run("print(1)")
    finally:
        sandbox.close()


@pytest.mark.skipif(os.getuid() != 0, reason="RLIMIT_NPROC keeps other users from forking")
@pytest.mark.parametrize("ends_by_itself", [True, False])
def test_without_the_filter_the_group_is_ended(ends_by_itself: bool) -> None:
    """A machine without seccomp is played by not asking for it."""
    sandbox = make(SandboxLimits(timeout_s=4.0), Isolation(seccomp=False, landlock=0))
    nap = f"60.{os.getpid()}{int(ends_by_itself)}"
    try:
        code = (
            f"import subprocess, time\nsubprocess.Popen(['sleep', '{nap}'])\n"
            "print('started', flush=True)\n"
        )
        reply = sandbox.run(code + ("" if ends_by_itself else "time.sleep(60)"))
        assert "started" in reply.text
    finally:
        sandbox.close()
    end = time.monotonic() + 10
    while left := [p for p in psutil.process_iter(["cmdline"]) if nap in (p.info["cmdline"] or [])]:
        assert time.monotonic() < end, left
        time.sleep(0.05)
