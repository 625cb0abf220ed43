"""The control channel: a virtio-serial port that the guest's init speaks on, one short line a message.

Guest: `boot 2`, `ready HASH|-`, `here`, `held`, `fail REASON`, `off`. Host: `go LENGTH LINES` and so many bytes
of shell assignments (answered by `ready`), `hold` (answered by `held`), `env LENGTH` and that many bytes (answered by
`done`), `mount LENGTH` and `unmount LENGTH` and assignments (by `done TAG` or `failed TAG REASON`), `sync` (by
`done`), `setup-done HASH`, `poweroff`, `ping` (answered by `pong`). See docs/decisions/003-control-channel.md.
"""

from __future__ import annotations

import os
import select
import shlex
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from nixbox.errors import NixboxError, TimeoutExpired
from nixbox.report import harmless
from nixbox.values import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal, Self

    # From where a guest takes on an identity: its own boot, the hold of a template, a copy of a running guest, or its
    # own state of before.
    How = Literal["boot", "hold", "fork", "resume"]
else:  # without what `typing` costs
    How = str

PROTOCOL = "2"
_LINE_LIMIT = 4096


class GuestError(NixboxError):
    """The guest said that it cannot go on, or ended before it did what was waited for."""


@dataclass(frozen=True, slots=True)
class Go:
    """All that is individual to a machine; none of it is in an image or a template.

    `how` says where the guest stands and `restored` whether it was saved before, so that its random numbers must be
    renewed. `image` is the image's store path, `grow` says that the overlay disk is larger than its file system, and
    `sidecars` how many disks there are beside it and the root.
    `host_key` is OpenSSH's private key file and `dropbear_key` the same in dropbear's format. `env` maps names to
    values (any bytes but NUL, as surrogate-escaped text), `files` guest paths to contents that are put in place where
    nothing is yet.
    """

    how: How
    restored: bool
    hostname: str
    user: str
    image: str
    grow: bool
    sidecars: int
    machine_id: str
    time_s: int
    address: str
    gateway: str
    dns: str
    host_key: bytes
    dropbear_key: bytes
    authorized_key: bytes
    env: Mapping[str, str]
    files: Mapping[str, str]

    def pack(self) -> bytes:
        """The shell text behind `go LENGTH LINES`: assignments, each value quoted, and the function `first_files`.

        Text and not an archive: the guest takes it on with no program of its own started, which under software
        emulation is most of the time that it would need.
        """
        variables = {
            "how": self.how,
            "restored": "1" if self.restored else "0",
            "hostname": self.hostname,
            "user": self.user,
            "image": self.image,
            "grow": "1" if self.grow else "0",
            "sidecars": str(self.sidecars),
            "machine_id": self.machine_id,
            "time": str(self.time_s),
            "address": self.address,
            "gateway": self.gateway,
            "dns": self.dns,
            "entropy": os.urandom(32).hex(),
            "host_key": self.host_key.decode().strip(),
            "dropbear_key": "".join(f"\\0{byte:03o}" for byte in self.dropbear_key),  # for printf %b: it holds NULs
            "authorized_key": self.authorized_key.decode().strip(),
            "env": env_text(self.env),
        }
        lines = [f"{name}={shlex.quote(value)}\n" for name, value in variables.items()]
        files = [f"put {shlex.quote(name.lstrip('/'))} {shlex.quote(body)}\n" for name, body in self.files.items()]
        return "".join((*lines, "first_files() {\n:\n", *files, "}\n")).encode(errors="surrogateescape")


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
        self.close()

    def close(self) -> None:
        """Disconnect; the guest goes on."""
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

    def expect(self, word: str, timeout_s: float, *, about: str = "") -> str:
        """Wait for a message that starts with `word`; returns the rest of it.

        `here`, which the guest says whenever somebody connects, is passed over, and so is the answer about a mount
        (`about`: its tag) that somebody asked for who did not wait. Raises GuestError on `fail`, and on `failed`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self.read_line(deadline - time.monotonic(), word)
            except TimeoutExpired:
                raise TimeoutExpired(f"the guest did not say `{word}` within {timeout_s:g} s") from None
            said, _, rest = line.partition(" ")
            if said in ("done", "failed"):
                tag, _, why = rest.partition(" ")
                if tag != about:
                    continue
                if said == "failed":  # what it was asked for; it goes on
                    raise GuestError(printable(why))
            if said == word:
                return rest
            if said == "fail":
                raise GuestError(f"the guest cannot start: {printable(rest)}")
            if said != "here":
                raise GuestError(f"the guest said `{printable(said)}` instead of `{word}`")

    def setup_done(self, setup: str, timeout_s: float) -> None:
        """Let the guest remember the hash of the setup that ran on its disk."""
        self.send(f"setup-done {setup}")
        self.expect("ready", timeout_s)

    def sync(self, timeout_s: float) -> None:
        """Let the guest write to its disk all that it holds in memory for it."""
        self.send("sync")
        self.expect("done", timeout_s)

    def push_env(self, env: Mapping[str, str], timeout_s: float) -> None:
        """Replace the environment of a running guest: new sessions see it."""
        data = env_text(env).encode(errors="surrogateescape")
        # The guest reads at least one byte.
        data = data or b"\n"
        self.send(f"env {len(data)}", data)
        self.expect("done", timeout_s)

    def mount(self, tag: str, target: str, *, readonly: bool, timeout_s: float) -> None:
        """Let the guest mount what it finds under `tag`. Raises GuestError when it cannot."""
        # What the host's own mount forbids anyway; a guest's root can take these away from itself again.
        options = "nosuid,nodev,ro" if readonly else "nosuid,nodev"
        self._about_share("mount", timeout_s, share_tag=tag, share_target=target, share_options=options)

    def unmount(self, tag: str, target: str, *, force: bool, timeout_s: float) -> None:
        """Let the guest unmount it. Raises GuestError when it is in use, unless `force` is set."""
        forced = "1" if force else "0"
        self._about_share("unmount", timeout_s, share_tag=tag, share_target=target, share_force=forced)

    def _about_share(self, word: str, timeout_s: float, **variables: str) -> None:
        lines = [f"{name}={shlex.quote(value)}\n" for name, value in variables.items()]
        data = "".join(lines).encode(errors="surrogateescape")
        self.send(f"{word} {len(data)}", data)
        self.expect("done", timeout_s, about=variables["share_tag"])

    def go(self, message: Go) -> None:
        """Send the machine's identity."""
        payload = message.pack()
        self.send(f"go {len(payload)} {payload.count(10)}", payload)


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
