"""A user and a network namespace for one machine, made without any privilege (user_namespaces(7)).

Nothing but a TAP device for the guest is in it, so whatever is not put there later cannot be reached. The VM's
process joins it and gives up every capability over it: even one that the guest has taken over cannot change a rule.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys

from nixbox import light, linux
from nixbox.network import policy
from nixbox.plan.network import NETWORK_MTU
from nixbox.values import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from nixbox.errors import HostError
    from nixbox.programs import Programs

_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_SIOCSIFMTU = 0x8922  # linux/sockios.h
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


@dataclass(frozen=True)
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
        """Let this process enter them, without any right over them: for a child, before it executes."""
        join(self.user, self.net)
        linux.give_up()


def join(user: int, net: int) -> None:
    """Enter a user namespace, with all rights in it, and a network namespace of it. Raises OSError."""
    linux.join_network(user, net)


def of_process(pid: int) -> tuple[int, int]:
    """The user and the network namespace of a process, as open descriptors. Raises OSError."""
    user = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return user, os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        os.close(user)
        raise


def create(programs: Programs | None = None) -> Namespace:
    """Make both namespaces and the TAP device. Raises HostError that says what this host does not allow."""
    ours, theirs = light.socket_pair(light.SOCK_SEQPACKET)
    with ours, theirs:
        wait = _forked(programs, theirs) if programs is not None and programs.waits else _fork(ours, theirs)
        theirs.close()
        words, fds = light.receive_fds(ours, 200, 3)
        wait()
    if len(fds) == 3:
        return Namespace(*fds)
    step, _, why = words.decode().partition(" ")
    raise _explained(step, why or "it does not say why")


def _forked(programs: Programs, theirs: light.Socket) -> Callable[[], object]:
    """Namespaces are entered for good, so another process does it: one that has less memory to share than we have."""
    fd = theirs.fileno()
    child = programs.start(__name__, "nixbox-namespace", [str(fd)], pass_fds=(fd,))
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            stream.close()
    return child.wait


def _fork(ours: light.Socket, theirs: light.Socket) -> Callable[[], object]:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            ours.close()
            _make(theirs)
            code = 0
        finally:
            os._exit(code)
    return lambda: os.waitpid(child, 0)


def main() -> None:
    """`namespace FD`: make them, and send them over that socket."""
    with light.Socket(fileno=int(sys.argv[-1])) as answer:
        _make(answer)


def _explained(step: str, why: str) -> HostError:
    from nixbox.errors import HostError  # not for those who only make one: it brings `enum`

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


def _make(answer: light.Socket) -> None:
    """In the child: enter new namespaces, make the device, and send all three."""
    step = "namespace"
    try:
        linux.own_user_namespace(linux.CLONE_NEWNET)
        step = "tun"
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", policy.DEVICE.encode(), flags))
        with light.Socket(light.AF_INET, light.SOCK_DGRAM) as sock:  # before any hypervisor asks for it
            fcntl.ioctl(sock, _SIOCSIFMTU, struct.pack("16si20x", policy.DEVICE.encode(), NETWORK_MTU))
        user, net = of_process(os.getpid())
        light.send_fds(answer, b"done", [user, net, tap])
    except OSError as error:
        answer.send(f"{step} {error.strerror}".encode())
