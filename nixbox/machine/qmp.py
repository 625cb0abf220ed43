"""A small synchronous client for QEMU's machine protocol (docs/interop/qmp-spec in QEMU's source).

One JSON object a line, both ways: a greeting, then commands and replies matched by `id`, and events at any
time. Synchronous on purpose: one owner drives one monitor, and asyncio would cost every command its import.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from nixbox.errors import NixboxError, TimeoutExpired
from nixbox.values import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn, Self

MAX_LINE_BYTES = 16 << 20  # the largest reply, query-qmp-schema, has some 200 kB; beyond this it is not QMP
MAX_EVENTS = 10_000  # events that nobody takes: a guest can cause some, so they must not grow without end
_CHUNK_BYTES = 65536
_GREETING = "its greeting (a monitor serves one client at a time)"


class QmpError(NixboxError):
    """A monitor that cannot be talked to, or that refused a command."""


class QmpClosed(QmpError):
    """Nobody is at the other end: QEMU ended, or closed the monitor, or never listened there."""


class QmpTimeout(QmpError, TimeoutExpired):
    """QEMU did not answer in time. The connection stays usable: a late reply is dropped."""


class QmpProtocolError(QmpError):
    """What came is not QMP. The connection is closed: its state is no longer known."""


class QmpCommandError(QmpError):
    """QEMU refused a command; `error_class` is GenericError, CommandNotFound, …, `desc` its own words."""

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(f"QEMU refused `{command}`: {desc}")
        self.error_class = error_class
        self.desc = desc


@dataclass(frozen=True, slots=True)
class Event:
    """An asynchronous message; `time_s` is the host's clock in seconds since the epoch (-1: not known)."""

    name: str
    data: Mapping[str, Any]
    time_s: float


class _Wait:
    """One bound for a whole call, however many pieces arrive meanwhile."""

    def __init__(self, what: str, timeout_s: float) -> None:
        self.what = what
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def left_s(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            self.expired()
        return left

    def expired(self) -> NoReturn:
        raise QmpTimeout(f"QEMU did not send {self.what} within {self.timeout_s:.3g} s")


class Qmp:
    """A negotiated connection to one monitor; a context manager. Not for use by two threads at once."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        """For `connect` and `from_socket`, which also negotiate."""
        self.version = ""  # of QEMU, like "7.2.22"
        self._sock = sock
        self._timeout_s = timeout_s
        self._received = bytearray()
        self._searched = 0  # bytes of `_received` known to hold no line end
        self._unsent = b""  # the rest of a command whose sending ran out of time
        self._events: deque[Event] = deque()
        self._end_reason: str | None = None
        # Random, so that a reply meant for an earlier client of the same monitor can never look like ours.
        self._session = os.urandom(4).hex()
        self._serial = 0

    @classmethod
    def connect(cls, path: Path | str, timeout_s: float) -> Self:
        """Connect to the monitor at unix socket `path` and negotiate, all within `timeout_s` seconds.

        `timeout_s` is also the default bound of `execute`. Raises QmpClosed when nobody listens there,
        QmpTimeout when no greeting comes, QmpError when the path is too long or the monitor is taken.
        """
        wait = _Wait(_GREETING, timeout_s)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(timeout_s)
            sock.connect(str(path))
        except OSError as error:
            sock.close()
            if isinstance(error, BlockingIOError):  # Linux: the listener's queue is full
                raise QmpError(f"the QEMU monitor at {path} is busy with another client") from None
            if error.errno is None:  # Python's own check, before any system call
                raise QmpError(f"{path} is too long: the path of a unix socket holds 107 bytes (unix(7))") from None
            raise QmpClosed(f"no QEMU monitor listens at {path}: {error.strerror}") from None
        return cls._negotiated(sock, timeout_s, wait)

    @classmethod
    def from_socket(cls, sock: socket.socket, timeout_s: float) -> Self:
        """As `connect`, on a connected socket that becomes ours: it is closed on failure, too."""
        return cls._negotiated(sock, timeout_s, _Wait(_GREETING, timeout_s))

    @classmethod
    def _negotiated(cls, sock: socket.socket, timeout_s: float, wait: _Wait) -> Self:
        self = cls(sock, timeout_s)
        try:
            greeting = self._read_message(wait)
            try:
                version = greeting["QMP"]["version"]["qemu"]
                self.version = f"{version['major']}.{version['minor']}.{version['micro']}"
            except (KeyError, TypeError):
                raise self._broken(f"this is not QEMU's greeting: {greeting!r:.200}") from None
            self.execute("qmp_capabilities", timeout_s=wait.left_s())
        except BaseException:
            self.close()
            raise
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; QEMU runs on. May be called twice."""
        self._end_reason = self._end_reason or "it was closed here"
        self._sock.close()

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        fds: Sequence[int] = (),
    ) -> Any:
        """Run one command and return what QEMU returned for it (`{}` for most).

        `timeout_s` bounds the whole call (None: the connection's own); QEMU goes on with a command that timed
        out. `fds` travel with the command as SCM_RIGHTS (for `getfd`, `add-fd`) and stay open here. Events
        that come meanwhile are queued. Raises QmpCommandError, QmpTimeout, QmpClosed, QmpProtocolError.
        """
        wait = _Wait(f"the reply to `{command}`", self._timeout_s if timeout_s is None else timeout_s)
        self._serial += 1
        ident = f"{self._session}-{self._serial}"
        request = {"execute": command, "id": ident} | ({"arguments": dict(arguments)} if arguments else {})
        self._send(json.dumps(request).encode() + b"\n", fds, wait)
        # A reply with another id belongs to a command that timed out, or to an earlier client.
        while (reply := self._read_reply(wait)) is None or reply.get("id") != ident:
            pass
        if "return" in reply:
            return reply["return"]
        match reply["error"]:
            case {"class": str(error_class), "desc": str(desc)}:
                raise QmpCommandError(command, error_class, desc)
            case other:
                raise self._broken(f"QEMU sent an error without class and text: {other!r:.200}")

    def wait_event(self, *names: str, timeout_s: float, where: Callable[[Event], bool] | None = None) -> Event:
        """Take the first event with one of `names` (none given: any) for which `where` holds.

        Events already queued count; the others stay queued in their order. `timeout_s` (seconds) bounds the
        whole call. Raises QmpTimeout, QmpClosed, QmpProtocolError.
        """
        wait = _Wait(f"the event {' or '.join(names) or '(any)'}", timeout_s)
        looked_at = 0
        while True:
            for index in range(looked_at, len(self._events)):
                event = self._events[index]
                if (not names or event.name in names) and (where is None or where(event)):
                    del self._events[index]
                    return event
            looked_at = len(self._events)
            self._read_reply(wait)

    def drain_events(self) -> list[Event]:
        """Take every event that has arrived, without waiting; also after the connection ended.

        Raises QmpProtocolError.
        """
        more = True
        while more:
            while (line := self._take_line()) is not None:
                self._sort(self._parse(line))
            try:
                more = self._end_reason is None and self._fill(None)
            except QmpClosed:
                more = False  # what came before the end is what was asked for
        events = list(self._events)
        self._events.clear()
        return events

    # --- sending --------------------------------------------------------------------------------------------

    def _send(self, data: bytes, fds: Sequence[int], wait: _Wait) -> None:
        self._flush(wait)  # what is left of an earlier command, or QEMU would read the two as one line
        self._unsent = self._send_some(data, fds, wait)
        self._flush(wait)

    def _flush(self, wait: _Wait) -> None:
        while self._unsent:
            self._unsent = self._send_some(self._unsent, (), wait)

    def _send_some(self, data: bytes, fds: Sequence[int], wait: _Wait) -> bytes:
        """Send what the socket takes, with all of `fds`; returns the rest."""
        self._check_open()
        self._sock.settimeout(wait.left_s())
        try:
            sent = socket.send_fds(self._sock, [data], list(fds))
        except TimeoutError:
            wait.expired()
        except ConnectionError as error:
            # Not ended yet: events that QEMU sent before it went can still be read.
            raise QmpClosed(f"QEMU closed its monitor: {error.strerror}") from None
        except OSError as error:  # a bad descriptor in `fds`: nothing was sent
            raise QmpError(f"cannot send to QEMU's monitor: {error.strerror}") from None
        return data[sent:]

    # --- receiving ------------------------------------------------------------------------------------------

    def _read_reply(self, wait: _Wait) -> dict[str, Any] | None:
        """The next message if it is a reply; an event is queued and None returned."""
        return self._sort(self._read_message(wait))

    def _read_message(self, wait: _Wait) -> dict[str, Any]:
        while (line := self._take_line()) is None:
            self._fill(wait)
        return self._parse(line)

    def _fill(self, wait: _Wait | None) -> bool:
        """Receive some bytes; without a `wait` only what is there, and False when that is nothing."""
        self._check_open()
        self._sock.settimeout(wait.left_s() if wait else 0)
        try:
            data = self._sock.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return False
        except TimeoutError:
            assert wait is not None
            wait.expired()
        except OSError as error:
            raise self._ended(QmpClosed(f"QEMU's monitor failed: {error.strerror}")) from None
        if not data:
            where = " in the middle of a message" if self._received else ""
            what = f" while waiting for {wait.what}" if wait else ""
            raise self._ended(QmpClosed(f"QEMU closed its monitor{where}{what}"))
        self._received += data
        return True

    def _take_line(self) -> bytes | None:
        while True:
            end = self._received.find(b"\n", self._searched)
            if (end if end >= 0 else len(self._received)) > MAX_LINE_BYTES:
                raise self._broken(f"QEMU sent a line of more than {MAX_LINE_BYTES} bytes")
            if end < 0:
                self._searched = len(self._received)
                return None
            line = bytes(self._received[:end]).strip()
            del self._received[: end + 1]
            self._searched = 0
            if line:
                return line

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise self._broken(f"QEMU sent what is not JSON: {line[:200]!r}") from None
        if not isinstance(message, dict):
            raise self._broken(f"QEMU sent what is not a JSON object: {line[:200]!r}")
        return message

    def _sort(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """Queue an event (and return None); hand a reply back."""
        match message:
            case {"return": _} | {"error": _, "id": _}:
                return message
            case {"error": error}:  # the specification: without an id when the input could not be parsed
                raise self._broken(f"QEMU could not read a command: {error!r:.200}")
            case {"event": str(name), **rest}:
                self._queue(name, rest)
                return None
        raise self._broken(f"QEMU sent neither a reply nor an event: {message!r:.200}")

    def _queue(self, name: str, rest: dict[str, Any]) -> None:
        data = rest.get("data", {})
        match rest.get("timestamp"):
            case {"seconds": int(seconds), "microseconds": int(micros)} if isinstance(data, dict):
                time_s = seconds + micros / 1e6 if seconds >= 0 else -1.0
            case _:
                raise self._broken(f"QEMU sent a malformed event {name}: {rest!r:.200}")
        if len(self._events) >= MAX_EVENTS:
            raise self._broken(f"more than {MAX_EVENTS} events arrived that nobody waited for")
        self._events.append(Event(name, data, time_s))

    # --- the end --------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._end_reason is not None:
            raise QmpClosed(f"the connection to QEMU's monitor has ended: {self._end_reason}")

    def _broken(self, message: str) -> QmpError:
        return self._ended(QmpProtocolError(message))

    def _ended(self, error: QmpError) -> QmpError:
        """Close for good and remember why; returns `error` to be raised."""
        self._end_reason = error.message
        self._received.clear()  # nothing behind a fault can be trusted
        self._sock.close()
        return error
