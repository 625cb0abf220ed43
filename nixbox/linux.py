"""Linux's own calls that Python does not have: namespaces, mounts and the loss of rights, through the C library.

All of them raise OSError. They are for a process that is about to become another program, or that ends soon.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

from nixbox import light

CLONE_NEWNS = 0x00020000  # sched.h
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
# linux/prctl.h
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS = 1, 24, 28, 38
_PR_SET_NAME = 15
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_SECBITS_NOROOT_LOCKED = 0b1111  # NOROOT, NO_SETUID_FIXUP and their locks (linux/securebits.h)
_LAST_CAPABILITY = 63
# Steps of a filter of system calls (classic BPF, linux/filter.h), its answers (linux/seccomp.h), and on which machine
# the calls are made (linux/audit.h).
BPF_LOAD, BPF_EQUAL, BPF_AT_LEAST, BPF_ANY_BIT, BPF_END = 0x20, 0x15, 0x35, 0x45, 0x06
SECCOMP_ALLOW, SECCOMP_KILL, SECCOMP_ERROR = 0x7FFF0000, 0x80000000, 0x00050000
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CAP_SETGID, CAP_SETUID = 6, 7  # linux/capability.h
MOST_FDS = 250  # in one message (SCM_MAX_FD in net/scm.h is 253)
_ROOM = 511  # hypervisors have a hundred to two hundred before they serve directories
_CAPABILITY_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8  # sys/mount.h
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE = 32, 4096, 16384, 1 << 18, 1 << 19
_MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4  # linux/mount.h
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_SYS_MOUNT_SETATTR = 442  # on every architecture (Linux 5.12)
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> None:
    """Raise OSError with the C library's errno unless `result` is 0."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def unshare(flags: int) -> None:
    """unshare(2)."""
    checked(_libc.unshare(flags))


def setns(fd: int, kind: int) -> None:
    """setns(2)."""
    checked(_libc.setns(fd, kind))


def join_network(user: int, net: int) -> None:
    """Enter a user namespace, with all rights in it, and a network namespace of it (both open descriptors)."""
    setns(user, CLONE_NEWUSER)
    setns(net, CLONE_NEWNET)


def own_user_namespace(further: int, ident: int | None = None) -> None:
    """Enter a new user namespace in which this user is `ident`, or who it is outside, and nobody else is anybody.

    `further` are flags of more namespaces to make, which belong to it: this process has every right over them.
    """
    uid, gid = os.geteuid(), os.getegid()
    inner = (uid, gid) if ident is None else (ident, ident)
    unshare(CLONE_NEWUSER | further)
    maps = (("uid_map", f"{inner[0]} {uid} 1"), ("gid_map", f"{inner[1]} {gid} 1"))
    for file, text in (("setgroups", "deny"), *maps):
        with open(f"/proc/self/{file}", "w") as out:
            out.write(text)


def give_up() -> None:
    """Never have a capability again, whatever this process executes: from then on. See `keep_only` for until then."""
    checked(_libc.prctl(_PR_SET_SECUREBITS, _SECBITS_NOROOT_LOCKED, 0, 0, 0))
    for capability in range(_LAST_CAPABILITY + 1):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            if ctypes.get_errno() != errno.EINVAL:
                checked(-1)
            break  # this kernel knows no more
    checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def keep_only(*capabilities: int) -> None:
    """Have no other capability from now on (capset(2)): for a process of one thread, which it is about."""
    kept = sum(1 << capability for capability in capabilities)
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    # Effective, permitted and inheritable; then those from the 32nd on.
    checked(_libc.capset(header, struct.pack("6I", kept, kept, 0, 0, 0, 0)))


def make_room() -> None:
    """Have a table for some hundred descriptors from now on: for a process that will have threads.

    Once it has, the kernel waits for every CPU at each doubling of the table (expand_fdtable, fs/file.c): some 10 ms.
    """
    with light.suppress(OSError):  # it may have fewer
        os.close(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, _ROOM))


def set_name(name: str) -> None:
    """The short name of this process, of which the kernel keeps 15 bytes."""
    checked(_libc.prctl(_PR_SET_NAME, ctypes.create_string_buffer(os.fsencode(name)), 0, 0, 0))


def end_with_parent(parent: int) -> None:
    """Let this process be killed when the one that started it, `parent`, ends: for a child, before it executes.

    A change of credentials takes it back (prctl(2)), so namespaces are to be joined before.
    """
    checked(_libc.prctl(_PR_SET_PDEATHSIG, light.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:  # it ended before it could be followed
        os._exit(1)


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    words = (source, target, kind)
    encoded = [None if word is None else os.fsencode(word) for word in words]
    checked(_libc.mount(*encoded, ctypes.c_ulong(flags), None if data is None else data.encode()))


def restrict_mounts(path: str, attributes: int) -> None:
    """mount_setattr(2): give a mount and all below it further restrictions (MOUNT_ATTR_…)."""
    wanted = ctypes.create_string_buffer(struct.pack("QQQQ", attributes, 0, 0, 0))
    call = (ctypes.c_long(_SYS_MOUNT_SETATTR), _AT_FDCWD, os.fsencode(path), _AT_RECURSIVE, wanted)
    checked(_libc.syscall(*call, ctypes.c_size_t(32)))


def pivot_root(directory: str) -> None:
    """Make a mounted directory the root and let go of everything else (pivot_root(2), "pivot_root(".", ".")")."""
    os.chdir(directory)
    checked(_libc.syscall(ctypes.c_long(_SYS_PIVOT_ROOT[os.uname().machine]), b".", b"."))
    checked(_libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def bpf(*steps: tuple[int, int, int, int]) -> bytes:
    """A program for `seccomp`. A step is its code, how many are left out if it holds and if not, and its value
    (struct sock_filter, linux/filter.h).
    """
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def seccomp(program: bytes) -> None:
    """Filter this process's system calls from here on (seccomp(2)): `program` is classic BPF, 8 bytes a step."""
    code = ctypes.create_string_buffer(program)
    description = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    checked(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.create_string_buffer(description), 0, 0))
