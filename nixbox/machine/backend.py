"""What every hypervisor backend takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nixbox.plan.model import Accelerator


@dataclass(frozen=True, slots=True)
class Features:
    """What a backend can do; a request beyond it fails in planning."""

    restore: bool
    hot_plug: bool
    user_network: bool


@dataclass(frozen=True, slots=True)
class VmSpec:
    """One virtual machine: files, shape, and where its channels are."""

    name: str
    kernel: Path
    initrd: Path
    root: Path
    overlay: Path
    console_log: Path
    vcpus: int
    memory_mib: int
    accelerator: Accelerator


@dataclass(frozen=True, slots=True)
class Sockets:
    """Unix sockets of a running machine, in its runtime directory."""

    control: Path
    monitor: Path

    @classmethod
    def in_dir(cls, directory: Path) -> Sockets:
        """The names are short: a unix socket path holds 107 bytes (unix(7))."""
        return cls(directory / "ctl", directory / "qmp")


class Backend(Protocol):
    """Starts and stops virtual machines. The process it starts holds the machine's lock as long as it lives."""

    name: str
    features: Features

    def check_host(self) -> None:
        """Raise HostError when this host cannot run the backend: asked before anything is built."""
        ...

    def start(self, spec: VmSpec, sockets: Sockets, lock_fd: int, log: Path) -> int:
        """Start a machine; returns its process id. The control socket accepts at once."""
        ...

    def ssh_port(self, sockets: Sockets) -> int:
        """The TCP port on the host's loopback that reaches the guest's sshd."""
        ...

    def status(self, sockets: Sockets) -> str:
        """`running`, or why it is not (`io-error`, `paused`, …)."""
        ...

    def resume(self, sockets: Sockets) -> None:
        """Let a machine that stopped on a full host disk go on."""
        ...

    def quit(self, sockets: Sockets) -> None:
        """End the machine at once, its disks flushed."""
        ...
