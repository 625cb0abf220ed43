"""The control channel: a virtio-serial port that the guest's init speaks on, one short line a message.

Guest: `boot 1`, `ready HASH|-`, `here`, `fail REASON`, `off`. Host: `go LENGTH` and that many bytes of a tar
archive, `env LENGTH` and that many bytes (answered by `done`), `setup-done HASH`, `poweroff`, `ping` (answered by
`pong`). See docs/decisions/003-control-channel.md.
"""

from __future__ import annotations

import io
import os
import secrets
import select
import shlex
import socket
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from nixbox.errors import NixboxError, TimeoutExpired
from nixbox.report import harmless

PROTOCOL = "1"
_LINE_LIMIT = 4096


class GuestError(NixboxError):
    """The guest said that it cannot go on, or ended before it did what was waited for."""


@dataclass(frozen=True, slots=True)
class Go:
    """All that is individual to a machine; none of it is in an image.

    `image` is the image's store path, `grow` says that the overlay disk is larger than its file system. `env` maps
    names to values (any bytes but NUL, as surrogate-escaped text), `files` guest paths to contents
    that are put in place where nothing is yet.
    """

    hostname: str
    user: str
    image: str
    grow: bool
    machine_id: str
    time_s: int
    address: str
    gateway: str
    dns: str
    host_key: bytes
    authorized_key: bytes
    env: Mapping[str, str]
    files: Mapping[str, str]

    def pack(self) -> bytes:
        """The tar archive that follows `go LENGTH`."""
        variables = {
            "hostname": self.hostname,
            "user": self.user,
            "image": self.image,
            "grow": "1" if self.grow else "0",
            "machine_id": self.machine_id,
            "time": str(self.time_s),
            "address": self.address,
            "gateway": self.gateway,
            "dns": self.dns,
        }
        text = "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items())
        members = [
            ("vars", text.encode(), 0o600),
            ("entropy", secrets.token_bytes(64), 0o600),
            ("env", env_text(self.env).encode(errors="surrogateescape"), 0o600),
            ("ssh/host_key", self.host_key, 0o600),
            ("ssh/authorized_keys", self.authorized_key, 0o644),
            *((f"files/{name.lstrip('/')}", body.encode(), 0o644) for name, body in self.files.items()),
        ]
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data, mode in members:
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(data), mode
                tar.addfile(info, io.BytesIO(data))
        return buffer.getvalue()


def env_text(env: Mapping[str, str]) -> str:
    """Shell text that exports each variable; single quotes hold every byte but NUL as it is."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())


class Control:
    """One connection to a machine's control channel; a context manager."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""

    @classmethod
    def connect(cls, path: Path) -> Self:
        """Connect to the socket that the VM process serves. Raises GuestError when nothing listens."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(path))
        except OSError as error:
            sock.close()
            raise GuestError(f"the machine's control channel does not answer: {error.strerror}") from None
        return cls(sock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sock.close()

    def send(self, line: str, payload: bytes = b"") -> None:
        """Send one message. Raises GuestError when the VM is gone."""
        try:
            self._sock.sendall(line.encode() + b"\n" + payload)
        except OSError:
            raise GuestError("the machine ended while it was spoken to") from None

    def read_line(self, timeout_s: float, waiting_for: str) -> str:
        """The guest's next message. Raises GuestError at the end of the VM, TimeoutExpired after the bound."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._sock], [], [], left)[0]:
                raise TimeoutExpired(f"the guest did not say `{waiting_for}` within {timeout_s:g} s")
            try:
                data = self._sock.recv(_LINE_LIMIT)
            except ConnectionError:
                data = b""
            if not data:
                raise GuestError(f"the machine ended before the guest said `{waiting_for}`")
            self._buffer += data
            if b"\n" not in self._buffer and len(self._buffer) > _LINE_LIMIT:
                # The guest is not trusted: it cannot make us hold more than one line.
                raise GuestError("the guest sent something that is no message")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="replace").strip()

    def expect(self, word: str, timeout_s: float) -> str:
        """Wait for a message that starts with `word`; returns the rest of it.

        `here`, which the guest says whenever somebody connects, is passed over. Raises GuestError on `fail`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self.read_line(deadline - time.monotonic(), word)
            except TimeoutExpired:
                raise TimeoutExpired(f"the guest did not say `{word}` within {timeout_s:g} s") from None
            said, _, rest = line.partition(" ")
            if said == word:
                return rest
            if said == "fail":
                raise GuestError(f"the guest cannot start: {printable(rest)}")
            if said != "here":
                raise GuestError(f"the guest said `{printable(said)}` instead of `{word}`")

    def push_env(self, env: Mapping[str, str], timeout_s: float) -> None:
        """Replace the environment of a running guest: new sessions see it."""
        data = env_text(env).encode(errors="surrogateescape")
        # The guest reads at least one byte.
        data = data or b"\n"
        self.send(f"env {len(data)}", data)
        self.expect("done", timeout_s)

    def go(self, message: Go) -> None:
        """Send the machine's identity."""
        payload = message.pack()
        self.send(f"go {len(payload)}", payload)


def printable(text: str) -> str:
    """What a guest said, safe to show on a terminal: no control characters, at most 300 characters."""
    return harmless(text)[:300]


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log, printable; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 65536))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [printable(line) for line in text.splitlines() if line.strip()][-lines:]
