"""The filter as a program: it is well formed, and holds on an interpreter of its own instructions.

That the kernel takes it, and what it then refuses, is proven in test_python_sandbox.py; here the
architecture that this machine does not have is looked at too.
"""

from __future__ import annotations

import errno
import platform
import struct

import pytest

from megatron_matpo.mcp_tools import seccomp

ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# name: number by machine
SOCKET = {"x86_64": 41, "aarch64": 198}
READ = {"x86_64": 0, "aarch64": 63}
CLONE = {"x86_64": 56, "aarch64": 220}
OPENAT = {"x86_64": 257, "aarch64": 56}
FCHMOD = {"x86_64": 91, "aarch64": 52}
IOCTL = {"x86_64": 16, "aarch64": 29}
PAIR = {"x86_64": 53, "aarch64": 199}


def decide(program: bytes, number: int, arch: int, *arguments: int) -> int:
    """Runs the classic BPF program on one system call; a jump out of it raises IndexError."""
    padded = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("<IIQ6Q", number, arch, 0, *padded)
    steps = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    at = accumulator = 0
    while True:
        code, if_true, if_false, operand = steps[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif code == 0x54:
            accumulator &= operand
        elif code == 0x06:
            return operand
        else:
            holds = {
                0x15: accumulator == operand,
                0x25: accumulator > operand,
                0x45: bool(accumulator & operand),
            }[code]
            at += if_true if holds else if_false


@pytest.fixture(params=["x86_64", "aarch64"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(platform, "machine", lambda: request.param)
    return request.param


def test_decisions(machine: str) -> None:
    program = seccomp.build_filter(may_write=True)
    assert program is not None

    def of(numbers: dict[str, int], *arguments: int) -> int:
        return decide(program, numbers[machine], ARCH[machine], *arguments)

    refused = ERRNO | errno.EPERM
    assert of(READ) == ALLOW
    assert of(SOCKET) == of(CLONE) == refused
    assert of(FCHMOD) == ERRNO, "succeeds without effect"
    assert of(OPENAT, 0, 0, 0o102) == ALLOW
    assert of(IOCTL, 1, 0x5401) == ALLOW
    assert of(IOCTL, 1, 0x40086602) == ERRNO | errno.ENOTTY
    assert of(PAIR, 1, 1 | 0o2000000) == ALLOW
    assert of(PAIR, 1, 2) == of(PAIR, 2, 1) == refused
    assert decide(program, 425, ARCH[machine]) == ERRNO | errno.ENOSYS
    assert decide(program, 9999, ARCH[machine]) == ERRNO | errno.ENOSYS
    assert decide(program, READ[machine], 0x40000003) == KILL, "another architecture's numbers"


def test_without_writing_every_open_that_writes_is_refused(machine: str) -> None:
    program = seccomp.build_filter(may_write=False)
    assert program is not None
    for flags, verdict in ((0, ALLOW), (0o2000000, ALLOW), (1, errno.EACCES), (2, errno.EACCES)):
        expected = verdict if verdict == ALLOW else ERRNO | verdict
        assert decide(program, OPENAT[machine], ARCH[machine], 0, 0, flags) == expected


def test_every_number_gets_a_verdict(machine: str) -> None:
    program = seccomp.build_filter(may_write=False)
    assert program is not None and len(program) % 8 == 0 and len(program) // 8 <= 4096
    kinds = {decide(program, number, ARCH[machine]) & 0xFFFF0000 for number in range(600)}
    assert kinds == {ALLOW, ERRNO}


def test_an_unknown_machine_has_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "sparc")
    assert seccomp.build_filter(may_write=True) is None
