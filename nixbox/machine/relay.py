"""What QEMU does with its serial ports and other hypervisors do not: connections that come and go on a unix socket.

Both functions are for threads of the process that is, or looks after, the VM: they live and end with it.
"""

from __future__ import annotations

import _thread
import select
import time

from nixbox import light

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    Connection = socket.socket | light.Socket

# The control messages that a payload of so many bytes follows (guest/control.py).
WITH_PAYLOAD = (b"go", b"env", b"mount", b"unmount")
_CHUNK = 1 << 16
_LONGEST = 16 << 20  # of one message
# Until the guest's server listens: a refused connection costs a fraction of this, one that nobody answers all of it.
# A guest that was just restored does not see what came before it woke up until something else comes: libkrun waits
# for its network device to change. So the first tries are short, and few, since all of them reach the guest then.
_CONNECT_TIMEOUTS_S = (0.02, 0.04, 0.08, 0.16, 0.32, 1.0)
_CONNECT_AGAIN_S = 0.005
_CONNECT_LIMIT_S = 60.0


class Framing:
    """Takes a stream of control messages apart: only whole ones come out."""

    def __init__(self) -> None:
        self._data = b""

    def whole(self, data: bytes) -> bytes:
        """What is complete with `data`. Raises ValueError for what is longer than any message."""
        self._data += data
        end = 0
        while (length := self._next(end)) is not None and end + length <= len(self._data):
            end += length
        if len(self._data) - end > _LONGEST:
            raise ValueError("a control message is longer than 16 MiB")
        done, self._data = self._data[:end], self._data[end:]
        return done

    def _next(self, start: int) -> int | None:
        """The length of the message at `start`, its payload included; None when its first line is not whole yet."""
        end = self._data.find(b"\n", start)
        if end < 0:
            return None
        words = self._data[start:end].split()
        payload = int(words[1]) if len(words) > 1 and words[0] in WITH_PAYLOAD and words[1].isdigit() else 0
        return end + 1 - start + payload


def serve_control(listener: Connection, guest: Connection) -> None:
    """Give whoever connects to `listener`, one at a time, the guest's control channel, which never closes.

    The guest does not notice that a host goes away, so it only ever gets whole messages: what was cut off in the
    middle is dropped. What it says while nobody is connected waits. Returns when the guest's end is closed.
    """
    while True:
        host, _ = listener.accept()
        with host:
            try:
                if not _session(host, guest):
                    return
            except ConnectionError:
                return


def _session(host: Connection, guest: Connection) -> bool:
    """Until the host has gone; whether the guest is still there. Raises ConnectionError of the guest's end."""
    framing = Framing()
    polled = select.poll()
    for sock in (host, guest):
        polled.register(sock, select.POLLIN)
    while True:
        ready = {fd for fd, _ in polled.poll()}
        if host.fileno() in ready:  # before the guest: what that says to a host that has gone is for the next
            try:
                data = host.recv(_CHUNK)
                whole = framing.whole(data)
            except (ConnectionError, ValueError):
                return True
            if not data:
                return True
            guest.sendall(whole)
        if guest.fileno() in ready:
            said = guest.recv(_CHUNK)
            if not said:
                return False
            try:
                host.sendall(said)
            except ConnectionError:
                return True


def serve_shell(listener: Connection, address: tuple[str, int]) -> None:
    """Make every connection to `listener` one to a server of the guest's, in this process's network namespace."""
    while True:
        host, _ = listener.accept()
        _thread.start_new_thread(_shell, (host, address))


def _shell(host: Connection, address: tuple[str, int]) -> None:
    with host:
        try:
            # A connection may be made before the guest goes on, to be there when it does. Not before a word has come:
            # what was begun and given up meanwhile would fill the server's queue when it wakes up.
            if not host.recv(1, light.MSG_PEEK):
                return
            guest = _connected(address)
        except OSError:
            return
        with guest:
            guest.setsockopt(light.IPPROTO_TCP, light.TCP_NODELAY, 1)
            there = _thread.allocate_lock()
            there.acquire()
            _thread.start_new_thread(_copy_there, (host, guest, there))
            _copy(guest, host)
            there.acquire()  # only then may they be closed


def _connected(address: tuple[str, int]) -> light.Socket:
    """Connect to a server that may not listen yet. Raises OSError after a minute."""
    deadline = time.monotonic() + _CONNECT_LIMIT_S
    timeouts = iter(_CONNECT_TIMEOUTS_S)
    timeout_s = next(timeouts)
    while True:
        # Not create_connection: it looks names up, for which a process in a jail has no files.
        guest = light.Socket(light.AF_INET, light.SOCK_STREAM)
        try:
            guest.settimeout(timeout_s)
            guest.connect(address)
        except OSError as error:
            guest.close()
            if isinstance(error, TimeoutError):
                timeout_s = next(timeouts, timeout_s)
            if time.monotonic() > deadline:
                raise
            time.sleep(_CONNECT_AGAIN_S)
        else:
            guest.settimeout(None)
            return guest


def _copy_there(host: Connection, guest: Connection, done: _thread.LockType) -> None:
    try:
        _copy(host, guest)
    finally:
        done.release()


def _copy(source: Connection, target: Connection) -> None:
    """Bytes one way until either end is closed; then both ways end: a shell's stream has no half."""
    try:
        while data := source.recv(_CHUNK):
            target.sendall(data)
    except OSError:
        pass
    for sock in (source, target):
        try:
            sock.shutdown(light.SHUT_RDWR)
        except OSError:
            continue
