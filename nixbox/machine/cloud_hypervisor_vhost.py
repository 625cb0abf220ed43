"""vhost-user passed on, for a hypervisor that connects to a path where nixbox has a connected socket to give.

Each message is taken from the one side and given to the other as a whole: the descriptors in it (memory, events)
belong to its header, and a copy of mere bytes would lose them, or hand them over with the message before.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from nixbox import light
from nixbox.errors import NixboxError

# docs/interop/vhost-user.rst in QEMU's source: request, flags, and the size of what follows; the host's byte order.
_HEADER = struct.Struct("=III")
_MESSAGE_LIMIT = 1 << 16  # the longest known has some 4 kB
_FDS_LIMIT = 253  # of one message (SCM_MAX_FD in Linux's include/net/scm.h)


class Directory:
    """A directory of the host in the guest: the connection between its process and cloud-hypervisor."""

    def __init__(self, connection: socket.socket) -> None:
        """`connection`, which becomes ours, speaks to the directory's process."""
        connection.setblocking(True)
        self._connection = connection
        self._taken = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def offered(self, path: Path) -> Iterator[None]:
        """In the body one connection to `path` is taken, and from then on served until either end closes.

        When the body fails all is closed. Raises NixboxError when nobody has connected in it.
        """
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            self._thread = threading.Thread(target=self._serve, args=(listener,), daemon=True)
            self._thread.start()
            try:
                yield
                if not self._taken.is_set():
                    raise NixboxError("cloud-hypervisor did not connect to the directory's process")
            except BaseException:
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)
                raise
            finally:
                with contextlib.suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)  # wakes one that still waits
                path.unlink(missing_ok=True)

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is served no more; whether that came in time."""
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _serve(self, listener: socket.socket) -> None:
        with self._connection:
            try:
                hypervisor, _ = listener.accept()
            except OSError:  # nobody came
                return
            self._taken.set()
            with hypervisor:
                ends = (self._connection, hypervisor)
                back = threading.Thread(target=forward, args=ends, daemon=True)
                back.start()
                forward(hypervisor, self._connection)
                back.join()


def forward(source: socket.socket, target: socket.socket) -> None:
    """Pass vhost-user messages on, with their descriptors, until either end closes or says what is none."""
    with contextlib.suppress(OSError, ValueError):
        while True:
            fds: list[int] = []
            try:
                header = _exactly(source, _HEADER.size, fds)
                size = _HEADER.unpack(header)[2]
                if size > _MESSAGE_LIMIT:
                    raise ValueError(f"a vhost-user message of {size} bytes")
                message = header + _exactly(source, size, fds)
                rest = message[socket.send_fds(target, [message], fds) :]
                if rest:
                    target.sendall(rest)
            finally:
                for fd in fds:
                    os.close(fd)
    for sock in (source, target):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _exactly(source: socket.socket, size: int, fds: list[int]) -> bytes:
    """So many bytes, and into `fds` what descriptors come with them. Raises OSError, also at the end."""
    data = b""
    while len(data) < size:
        part, came = light.receive_fds(source, size - len(data), _FDS_LIMIT)
        fds += came
        if not part:
            raise ConnectionResetError("the other end closed")
        data += part
    return data
