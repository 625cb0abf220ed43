"""The QEMU backend: one child process per machine, spoken to by QMP."""

from __future__ import annotations

import platform
import re
import socket
import sys
from pathlib import Path

from nixbox import run
from nixbox.errors import HostError, NixboxError
from nixbox.machine import qemu_args
from nixbox.machine.backend import Features, Sockets, VmSpec
from nixbox.machine.qmp import Qmp, QmpClosed

_QMP_TIMEOUT_S = 10.0


def _listen(path: Path) -> socket.socket:
    """A listening unix socket, private to this user; a stale one is replaced."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(8)
    except OSError as error:
        listener.close()
        raise NixboxError(f"cannot make the socket {path}: {error.strerror}") from None
    return listener


class Qemu:
    """Backend `qemu`: runs anywhere QEMU does, with KVM, Apple's hypervisor or software emulation."""

    name = "qemu"
    features = Features(restore=False, hot_plug=False, user_network=True)

    def check_host(self) -> None:
        """QEMU and what goes with a machine: its disk's and its keys' programs. Raises HostError."""
        if platform.machine() not in ("x86_64", "AMD64"):
            raise HostError(
                f"this version runs machines on x86_64 hosts only, not on {platform.machine()}",
                hint="images for aarch64 can be locked and built already",
            )
        for program in ("qemu-system-x86_64", "mke2fs", "ssh", "ssh-keygen"):
            run.tool(program)

    def start(self, spec: VmSpec, sockets: Sockets, lock_fd: int, log: Path) -> int:
        """Start QEMU with the listening sockets and the machine's lock as inherited descriptors."""
        with _listen(sockets.control) as control, _listen(sockets.monitor) as monitor:
            fds = qemu_args.Fds(control.fileno(), monitor.fileno())
            argv = qemu_args.argv(spec, fds, sandbox=sys.platform == "linux")
            return run.spawn(argv, log=log, pass_fds=(control.fileno(), monitor.fileno(), lock_fd)).pid

    def ssh_port(self, sockets: Sockets) -> int:
        """Read QEMU's own table of forwarded ports (`info usernet`)."""
        with Qmp.connect(sockets.monitor, _QMP_TIMEOUT_S) as qmp:
            table = qmp.execute("human-monitor-command", {"command-line": "info usernet"})
        # "  TCP[HOST_FORWARD]  12       127.0.0.1 40123       10.0.2.15    22     0     0"
        found = re.search(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+22\s", table)
        if found is None:
            raise NixboxError(f"QEMU forwards no port to the guest's sshd:\n{table}")
        return int(found[1])

    def status(self, sockets: Sockets) -> str:
        """QEMU's RunState (qapi/run-state.json)."""
        with Qmp.connect(sockets.monitor, _QMP_TIMEOUT_S) as qmp:
            return str(qmp.execute("query-status")["status"])

    def resume(self, sockets: Sockets) -> None:
        """`cont`: the write that failed for lack of space is tried again."""
        with Qmp.connect(sockets.monitor, _QMP_TIMEOUT_S) as qmp:
            qmp.execute("cont")

    def quit(self, sockets: Sockets) -> None:
        """`quit`; a QEMU that closes the socket before it answers has done so too."""
        try:
            with Qmp.connect(sockets.monitor, _QMP_TIMEOUT_S) as qmp:
                qmp.execute("quit")
        except QmpClosed:
            return


def version() -> str:
    """QEMU's version, e.g. `7.2.22`."""
    text = run.run(["qemu-system-x86_64", "--version"], timeout_s=20).stdout
    found = re.search(r"version (\S+)", text)
    return found[1] if found else "unknown"
