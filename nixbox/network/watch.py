"""Starting the guard of a machine's network, and talking to it: the host's side of `guard`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import marshal
import os
import select
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

from nixbox import run
from nixbox.errors import HostError, NixboxError
from nixbox.network import namespace
from nixbox.plan.network import Policy
from nixbox.programs import Program, Programs
from nixbox.values import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

GUARD = "nixbox.network.guard"
_READY_TIMEOUT_S = 30.0
_ASK_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Files:
    """Where a machine's guard has its things: sockets and logs of the process, and what was refused."""

    runtime: Path
    lock: Path
    log: Path
    refused: Path

    @property
    def control(self) -> Path:
        """The socket that `ask` speaks to."""
        return self.runtime / "net"


class Watch:
    """One guard, from its start until it has said that it is ready. `policy` None: nothing leaves, nobody watches."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy
        self._process: Program | None = None

    def begin(
        self, name: str, files: Files, user: int, net: int, alive: int, programs: Programs | None = None
    ) -> None:
        """Start the guard of the namespaces. It ends when `alive`, a descriptor, can be read or is at its end.

        Raises HostError when something is missing that the policy needs.
        """
        if self.policy is None:
            return
        settings = {
            "policy": self.policy.as_json(),
            "pasta": [] if self.policy.mode == "off" else pasta(),
            "nftables": library(),
            "runtime": str(files.runtime),
            "log": str(files.refused),
        }
        # Held by all of its processes, so that whoever ends the machine can wait for them.
        lock = os.open(files.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            fds = (user, net, alive)
            self._process = (programs or Programs()).start(
                GUARD, f"nixbox-guard-{name}", [*map(str, fds)], log=files.log, pass_fds=(*fds, lock)
            )
        finally:
            os.close(lock)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it says why on its way out
            self._process.stdin.write(marshal.dumps(settings))
            self._process.stdin.close()

    def settle(self) -> str | None:
        """Wait until the policy holds and the outside is there; returns why it is not there, which may pass.

        Raises HostError when the policy cannot be enforced on this host.
        """
        if self._process is None:
            return None
        process, self._process = self._process, None
        pipe = process.stdout
        assert pipe is not None
        with pipe:
            answer = pipe.readline() if select.select([pipe], [], [], _READY_TIMEOUT_S)[0] else b""
        word, _, why = answer.decode(errors="replace").strip().partition(" ")
        if word != "ready":
            raise HostError(
                f"the machine's network cannot be enforced: {why or 'its guard ended or did not answer'}",
                hint="`nixbox doctor` says what is missing; no machine gets a wider network than its config says",
            )
        return why or None


def library() -> str:
    """libnftables: where `NIXBOX_LIBNFTABLES` says, else what the loader finds."""
    return os.environ.get("NIXBOX_LIBNFTABLES") or "libnftables.so.1"


def pasta() -> list[str]:
    """passt's program in its form for namespaces, told to map nothing of the host into them (passt(1))."""
    argv = [run.tool("pasta"), "--foreground", "--quiet", "--config-net", "--no-map-gw", "--ipv4-only"]
    for direction in ("-t", "-u", "-T", "-U"):
        argv += [direction, "none"]
    if os.geteuid() == 0:  # it would become `nobody`, who may not enter our namespace
        argv += ["--runas", "0:0"]
    return argv


def ask(files: Files, fds: Sequence[int] = (), **request: Any) -> dict[str, Any]:
    """Ask a running guard how it is, and one of these: `allow` domains; `watch` over the process of a mount (`tag`,
    `queues`; `fds`: its pidfd and those of a standin.Device), `forget` that of a tag.

    Raises NixboxError when it does not answer.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_ASK_TIMEOUT_S)
            sock.connect(str(files.control))
            socket.send_fds(sock, [json.dumps(request).encode()], fds)
            sock.shutdown(socket.SHUT_WR)
            data = b""
            while more := sock.recv(1 << 16):
                data += more
        answer: dict[str, Any] = json.loads(data)
    except (OSError, ValueError) as error:
        raise NixboxError(
            f"the guard of the machine's network does not answer: {error}", hint="`nixbox up` starts it again"
        ) from None
    return answer


def heal(watch: Watch, name: str, files: Files, pid: int) -> bool:
    """Start a guard anew for a VM whose guard is gone; whether that was so. Raises HostError."""
    if watch.policy is None:
        return False
    with contextlib.suppress(NixboxError):
        ask(files)
        return False
    with contextlib.suppress(OSError, ValueError):
        _end_pasta(int((files.runtime / "pasta.pid").read_text()))
    try:
        user, net = namespace.of_process(pid)
        alive = os.pidfd_open(pid)
    except OSError as error:
        raise HostError(f"the machine's network namespace cannot be entered: {error.strerror}") from None
    try:
        watch.begin(name, files, user, net, alive)
    finally:
        for fd in (user, net, alive):
            os.close(fd)
    return True


def _end_pasta(pid: int) -> None:
    """End what a guard that was killed has left behind, if that is still what it was."""
    if b"pasta" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
        os.kill(pid, signal.SIGKILL)
