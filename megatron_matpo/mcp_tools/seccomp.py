"""A system call filter for code that nobody vouches for: one process, no network, no one else.

`build_filter` makes a classic BPF program for Linux's seccomp. It needs no privilege and no
namespace, so it works in containers and for any user. What is refused answers EPERM, except for
what C libraries try first and replace (ENOSYS) and for changes of mode and time, which succeed
without effect, because copying a file makes them.

Known system calls are refused by name; all that are newer than `_LAST_KNOWN` are refused too.

Source: Linux `Documentation/userspace-api/seccomp_filter.rst`; numbers from `asm/unistd_64.h`
(x86-64) and `asm-generic/unistd.h` (arm64).
"""

from __future__ import annotations

import errno
import platform
import socket
import struct
from collections.abc import Iterable

# name x86-64 arm64; "-" where an architecture has no such call.
_REFUSED = """
socket 41 198  bind 49 200  listen 50 201  connect 42 203  accept 43 202  accept4 288 242
fork 57 -  vfork 58 -  clone 56 220  execve 59 221  execveat 322 281
kill 62 129  tkill 200 130  tgkill 234 131  rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240
ptrace 101 117  process_vm_readv 310 270  process_vm_writev 311 271  kcmp 312 272
setsid 112 157  setpgid 109 154  prctl 157 167
setpriority 141 140  ioprio_set 251 30  sched_setaffinity 203 122  sched_setscheduler 144 119
sched_setparam 142 118  sched_setattr 314 274  migrate_pages 256 238  move_pages 279 239
mbind 237 235  set_mempolicy 238 237  personality 135 92  modify_ldt 154 -  uselib 134 -
unshare 272 97  setns 308 268  mount 165 40  umount2 166 39  pivot_root 155 41  chroot 161 51
swapon 167 224  swapoff 168 225  reboot 169 142  sethostname 170 161  setdomainname 171 162
init_module 175 105  finit_module 313 273  delete_module 176 106  kexec_load 246 104
kexec_file_load 320 294  acct 163 89  syslog 103 116  quotactl 179 60  vhangup 153 58
settimeofday 164 170  clock_settime 227 112  clock_adjtime 305 266  adjtimex 159 171
ioperm 173 -  iopl 172 -  lookup_dcookie 212 18  sync 162 81  syncfs 306 267
fanotify_init 300 262  inotify_init 253 -  inotify_init1 294 26
bpf 321 280  perf_event_open 298 241  userfaultfd 323 282  memfd_create 319 279
add_key 248 217  request_key 249 218  keyctl 250 219  io_setup 206 0  io_submit 209 2
shmget 29 194  shmat 30 196  shmctl 31 195  semget 64 190  semop 65 193  semtimedop 220 192
semctl 66 191  msgget 68 186  msgsnd 69 189  msgrcv 70 188  msgctl 71 187
mq_open 240 180  mq_unlink 241 181  mq_notify 244 184
name_to_handle_at 303 264  open_by_handle_at 304 265  mknod 133 -  mknodat 259 33
truncate 76 45  chown 92 -  fchown 93 55  lchown 94 -  fchownat 260 54
setxattr 188 5  lsetxattr 189 6  fsetxattr 190 7
removexattr 197 14  lremovexattr 198 15  fremovexattr 199 16
"""
_WITHOUT_EFFECT = """
chmod 90 -  fchmod 91 52  fchmodat 268 53
utime 132 -  utimes 235 -  futimesat 261 -  utimensat 280 88
"""
_CHANGES_FOLDERS = """
creat 85 -  mkdir 83 -  mkdirat 258 34  rmdir 84 -  unlink 87 -  unlinkat 263 35
rename 82 -  renameat 264 38  renameat2 316 276  link 86 -  linkat 265 37
symlink 88 -  symlinkat 266 36
"""
_OPENAT, _OPEN = "openat 257 56", "open 2 -"
_SOCKETPAIR, _FCNTL, _IOCTL, _PRLIMIT = (
    "socketpair 53 199",
    "fcntl 72 25",
    "ioctl 16 29",
    "prlimit64 302 261",
)
# From 424 on all architectures share the numbers. Refused of them: pidfd_send_signal, io_uring_*,
# the new mount calls, pidfd_open, clone3 (C libraries then use clone), openat2 (its flags cannot be
# seen here), pidfd_getfd, process_madvise, mount_setattr, quotactl_fd.
_REFUSED_NEW = (*range(424, 436), 437, 438, 440, 442, 443)
_LAST_KNOWN = 446

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""Machine -> (AUDIT_ARCH_*, column of the tables)."""

_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _JUMP_EQ, _JUMP_GT, _JUMP_SET, _AND, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x54, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16

# Open flags that create or change a file: O_WRONLY, O_RDWR, O_CREAT, O_TRUNC (the same on both).
_WRITE_FLAGS = 0o1 | 0o2 | 0o100 | 0o1000
# By these a process can have signals sent to others, or keep them from a file: F_SETOWN, F_SETSIG,
# F_SETOWN_EX, F_SETLEASE.
_FCNTL_REFUSED = (8, 10, 15, 1024)
# Only what asks for state, or sets that of a handle: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO,
# FIONCLEX, FIOCLEX. Others change attributes of files that are open for reading.
_IOCTL_ALLOWED = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)

Instruction = tuple[int, int, int, int]
"""code, jump if true, jump if false, operand."""


def build_filter(may_write: bool) -> bytes | None:
    """The program as `struct sock_filter[]`; None for a machine whose numbers are not known here.

    Args:
        may_write: files may be created and changed as far as other means (Landlock) allow it; else
            every call that creates or changes a file is refused.
    """
    if platform.machine() not in _ARCHITECTURES:
        return None
    arch, column = _ARCHITECTURES[platform.machine()]
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQ, 1, 0, arch),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        # Newer calls, and those of the x32 interface, whose numbers start at 2**30.
        (_JUMP_GT, 0, 1, _LAST_KNOWN),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    ]
    program += _for_numbers(_REFUSED_NEW, errno.ENOSYS)
    program += _for_numbers(_numbers(_REFUSED, column), errno.EPERM)
    program += _for_numbers(_numbers(_WITHOUT_EFFECT, column), 0)
    if not may_write:
        program += _for_numbers(_numbers(_CHANGES_FOLDERS, column), errno.EACCES)
        for text, argument in ((_OPENAT, 2), (_OPEN, 1)):
            for number in _numbers(text, column):
                program += _if_flags(number, argument, _WRITE_FLAGS, errno.EACCES)
    for number in _numbers(_FCNTL, column):
        refuse = _for_numbers(_FCNTL_REFUSED, errno.EPERM)
        program += _look_at(number, 1, [*refuse, (_RETURN, 0, 0, _ALLOW)])
    for number in _numbers(_IOCTL, column):
        allow = _returns(_IOCTL_ALLOWED, _ALLOW)
        program += _look_at(number, 1, [*allow, (_RETURN, 0, 0, _ERRNO | errno.ENOTTY)])
    for number in _numbers(_SOCKETPAIR, column):
        program += _stream_pair_only(number)
    for number in _numbers(_PRLIMIT, column):
        program += _own_process_only(number)
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *item) for item in program)


def _numbers(table: str, column: int) -> list[int]:
    words = table.split()
    found = words[1 + column :: 3]
    return [int(word) for word in found if word != "-"]


def _for_numbers(numbers: Iterable[int], error: int) -> list[Instruction]:
    return _returns(numbers, _ERRNO | error)


def _returns(numbers: Iterable[int], verdict: int) -> list[Instruction]:
    """`verdict` if what was loaded is one of `numbers`; else what follows decides."""
    return [
        item for number in numbers for item in ((_JUMP_EQ, 0, 1, number), (_RETURN, 0, 0, verdict))
    ]


def _argument(index: int) -> Instruction:
    """Load the low half of an argument; the calls looked at here take 32 bits."""
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * index)


def _look_at(number: int, index: int, body: list[Instruction]) -> list[Instruction]:
    """For system call `number` load an argument and let `body`, which ends all, decide."""
    return [(_JUMP_EQ, 0, len(body) + 1, number), _argument(index), *body]


def _if_flags(number: int, index: int, flags: int, error: int) -> list[Instruction]:
    body = [(_JUMP_SET, 0, 1, flags), (_RETURN, 0, 0, _ERRNO | error), (_RETURN, 0, 0, _ALLOW)]
    return _look_at(number, index, body)


def _stream_pair_only(number: int) -> list[Instruction]:
    """A pair of connected Unix sockets reaches nobody else; asyncio cannot start without it."""
    body = [
        (_JUMP_EQ, 0, 4, socket.AF_UNIX),
        _argument(1),
        (_AND, 0, 0, 0xF),  # the other bits are SOCK_CLOEXEC and SOCK_NONBLOCK
        (_JUMP_EQ, 0, 1, socket.SOCK_STREAM),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]
    return _look_at(number, 0, body)


def _own_process_only(number: int) -> list[Instruction]:
    """`prlimit64` of others is refused; process 0 is the caller."""
    body = [*_returns([0], _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    return _look_at(number, 0, body)
