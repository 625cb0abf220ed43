"""What the processes that a start waits for use of `socket`, `signal` and `contextlib`, without what these import.

`socket` and `signal` make enumerations of some hundred constants, and import what that takes. What they do is done by
modules of the interpreter's that are compiled, and that are used here. See docs/decisions/040-compiled-halves.md.
"""

from __future__ import annotations

import _socket
import os
import struct
from _socket import *  # noqa: F403 (constants and functions, as `socket` has them)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from signal import SIG_DFL, SIG_IGN, SIGINT, SIGKILL, SIGPIPE, SIGTERM, signal
    from typing import Any, Self
else:
    from _signal import SIG_DFL, SIG_IGN, SIGINT, SIGKILL, SIGPIPE, SIGTERM, signal

__all__ = ["SIGINT", "SIGKILL", "SIGPIPE", "SIGTERM", "SIG_DFL", "SIG_IGN", "signal"]  # for others to have from here
_INT = struct.calcsize("i")
_CLOEXEC = getattr(_socket, "MSG_CMSG_CLOEXEC", 0)  # not on macOS


class Socket(_socket.socket):
    """`socket.socket` as far as it is needed: a context manager, as the sockets are that it accepts."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def accept(self) -> tuple[Socket, Any]:
        """The next connection, and who made it. Raises OSError."""
        fd, address = self._accept()  # type: ignore[attr-defined]
        return Socket(self.family, self.type, self.proto, fd), address


def socket_pair(kind: int) -> tuple[Socket, Socket]:
    """Two unix sockets of a kind (SOCK_…) that are connected. Raises OSError."""
    one, other = _socket.socketpair(_socket.AF_UNIX, kind)
    return Socket(fileno=one.detach()), Socket(fileno=other.detach())


def send_fds(sock: _socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """`socket.send_fds`. Raises OSError."""
    sock.sendmsg([data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))])


def receive_fds(sock: _socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """At most `size` bytes, and at most `most` descriptors that no program inherits. Raises OSError, also for more.

    (`socket.recv_fds` ignores the flag for the one, CPython's issue 107898, and leaves the other to who calls it.)
    """
    data, ancillary, said, _ = sock.recvmsg(size, _socket.CMSG_LEN(most * _INT), _CLOEXEC)
    fds: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
            count = len(content) // _INT  # one that did not fit may be cut
            fds += struct.unpack(f"{count}i", content[: count * _INT])
    if said & _socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        raise OSError("more descriptors came than were asked for")
    return data, fds


class suppress:
    """`contextlib.suppress`."""

    def __init__(self, *exceptions: type[BaseException]) -> None:
        self._exceptions = exceptions

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, self._exceptions)
