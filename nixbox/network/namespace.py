"""A user and a network namespace for one machine, made without any privilege (user_namespaces(7)).

Nothing but a TAP device for the guest is in it, so whatever is not put there later cannot be reached. The VM's
process joins it and gives up every capability over it: even one that the guest has taken over cannot change a rule.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from nixbox.errors import HostError
from nixbox.network import policy

_CLONE_NEWUSER = 0x10000000  # sched.h
_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
# linux/prctl.h
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS = 1, 24, 28, 38
_SECBITS_NOROOT_LOCKED = 0b1111  # NOROOT, NO_SETUID_FIXUP and their locks (linux/securebits.h)
_LAST_CAPABILITY = 63

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Namespace:
    """The two namespaces and the TAP device in them, as open descriptors; a context manager that closes them."""

    user: int
    net: int
    tap: int

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in (self.user, self.net, self.tap):
            os.close(fd)

    def join_for_good(self) -> None:
        """Let this process live in the namespaces without any right over them: for a child, before it executes."""
        join(self.user, self.net)
        give_up()


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def join(user: int, net: int) -> None:
    """Enter a user namespace, with all rights in it, and a network namespace of it. Raises OSError."""
    _checked(_libc.setns(user, _CLONE_NEWUSER))
    _checked(_libc.setns(net, _CLONE_NEWNET))


def give_up() -> None:
    """Never have a capability again, whatever this process executes. Raises OSError."""
    _checked(_libc.prctl(_PR_SET_SECUREBITS, _SECBITS_NOROOT_LOCKED, 0, 0, 0))
    for capability in range(_LAST_CAPABILITY + 1):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            if ctypes.get_errno() != errno.EINVAL:
                _checked(-1)
            break  # this kernel knows no more
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def end_with_parent() -> None:
    """Let this process be killed when the one that started it ends: for a child, before it executes."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def of_process(pid: int) -> tuple[int, int]:
    """The user and the network namespace of a process, as open descriptors. Raises OSError."""
    user = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return user, os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        os.close(user)
        raise


def create() -> Namespace:
    """Make both namespaces and the TAP device. Raises HostError that says what this host does not allow."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        child = os.fork()  # namespaces are entered for good, so a child does it
        if child == 0:
            code = 1
            try:
                ours.close()
                _make(theirs)
                code = 0
            finally:
                os._exit(code)
        theirs.close()
        words, fds, _, _ = socket.recv_fds(ours, 200, 3, socket.MSG_CMSG_CLOEXEC)
        os.waitpid(child, 0)
    if len(fds) == 3:
        return Namespace(*fds)
    step, _, why = words.decode().partition(" ")
    raise _explained(step, why or "it does not say why")


def _explained(step: str, why: str) -> HostError:
    if step == "tun":
        return HostError(
            f"no network device can be made for a machine: /dev/net/tun: {why}",
            hint="load the kernel module `tun`, and let everybody use the device as distributions do: "
            "chmod 0666 /dev/net/tun",
        )
    return HostError(
        f"this host does not allow a network namespace for an ordinary user: {why}",
        hint="allow unprivileged user namespaces (user.max_user_namespaces, kernel.unprivileged_userns_clone, "
        "kernel.apparmor_restrict_unprivileged_userns); `nixbox doctor` tells more",
    )


def _make(answer: socket.socket) -> None:
    """In the child: enter new namespaces, make the device, and send all three."""
    step = "namespace"
    uid, gid = os.geteuid(), os.getegid()
    try:
        _checked(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET))
        for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path(f"/proc/self/{file}").write_text(text)
        step = "tun"
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", policy.DEVICE.encode(), flags))
        user, net = of_process(os.getpid())
        socket.send_fds(answer, [b"done"], [user, net, tap])
    except OSError as error:
        answer.send(f"{step} {error.strerror}".encode())
