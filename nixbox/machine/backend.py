"""What every hypervisor backend takes and gives."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nixbox import run
from nixbox.errors import NixboxError
from nixbox.plan.model import Accelerator, Queue
from nixbox.values import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol, Self

    from nixbox.jails import Share
    from nixbox.programs import Programs
else:  # without what `typing` costs
    Protocol = object


@dataclass(frozen=True, slots=True)
class Features:
    """What a backend can do; a request beyond it fails in planning.

    `templates`: new machines are restored from a saved guest. `restore`: any running machine is saved and goes on
    elsewhere or later (suspend, fork). `hot_plug`: directories of the host come and go while a machine runs.
    `emulates`: it runs on hosts without KVM or HVF.
    """

    templates: bool
    restore: bool
    hot_plug: bool
    emulates: bool


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """A file behind a guest's memory: `shared` writes to it, else pages are copied when they are written."""

    path: Path
    shared: bool

    @classmethod
    def of(cls, fd: int, *, shared: bool) -> Self:
        """The file of a descriptor, which the VM's process has to inherit."""
        return cls(Path(f"/proc/self/fd/{fd}"), shared)


@dataclass(frozen=True, slots=True)
class VmSpec:
    """One virtual machine: files, shape, and what it begins with.

    `memory_file` None: anonymous memory. `incoming`: it waits for the state of a saved VM instead of booting.
    `bound`: it ends when the process that started it does. `return_memory`: what the guest frees goes back to the
    host, which makes holes in a memory file. For a backend that cannot plug directories in later, `slots` is how many
    of them the machine has devices for, and `shares` what is behind the first of those. `sidecars` are further
    read-only disks, whose files cover each other's and the root's in their order.
    """

    name: str
    kernel: Path
    initrd: Path
    root: Path
    overlay: Path
    console_log: Path
    vcpus: int
    memory_mib: int
    disk_mib: int
    accelerator: Accelerator
    memory_file: MemoryFile | None = None
    incoming: bool = False
    bound: bool = False
    return_memory: bool = False
    sidecars: tuple[Path, ...] = ()
    slots: int = 0
    shares: tuple[Share, ...] = ()


def disks(spec: VmSpec) -> list[tuple[str, Path, bool]]:
    """A machine's disks in their order: the name (serial number) by which the guest knows it, the file, read-only."""
    sidecars = [(f"sidecar{number}", path, True) for number, path in enumerate(spec.sidecars)]
    return [("root", spec.root, True), ("overlay", spec.overlay, False), *sidecars]


def architecture() -> str:
    """This host's, as uname(2) has it: to import `platform`, which asks the same, takes longer than all else here."""
    return os.uname().machine


def slot_tag(number: int) -> str:
    """The tag in the guest of a device that is there from the start (VmSpec.slots)."""
    return f"nixbox-{number}"


def listening(path: Path) -> socket.socket:
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


def check_tools(*more: str) -> None:
    """Raise HostError when a program is missing: one that makes every machine's disk or keys, or one of `more`."""
    for program in (*more, "mke2fs", "ssh", "ssh-keygen"):
        run.tool(program)


@dataclass(frozen=True, slots=True)
class Sockets:
    """Unix sockets of a running machine, in its runtime directory; `shell` is that of nixbox's own SSH connection."""

    control: Path
    monitor: Path
    shell: Path

    @classmethod
    def in_dir(cls, directory: Path) -> Sockets:
        """The names are short: a unix socket path holds 107 bytes (unix(7))."""
        return cls(directory / "ctl", directory / "qmp", directory / "ssh")

    @contextmanager
    def listening(self) -> Iterator[tuple[socket.socket, socket.socket, socket.socket]]:
        """All three of them, for the VM's process to inherit. Raises NixboxError."""
        with listening(self.control) as control, listening(self.monitor) as monitor, listening(self.shell) as shell:
            yield control, monitor, shell


class Network(Protocol):
    """The namespace that a VM's process is to live in, and the device in it that is the guest's network card."""

    @property
    def user(self) -> int:
        """The user namespace that the others belong to, an open descriptor."""

    @property
    def net(self) -> int:
        """The network namespace, an open descriptor."""

    @property
    def tap(self) -> int:
        """The TAP device, an open descriptor."""

    def join_for_good(self) -> None:
        """Called in the VM's process before it executes the hypervisor. Raises OSError."""


class Backend(Protocol):
    """Starts and stops virtual machines. The process it starts holds the machine's lock as long as it lives."""

    name: str
    kernel: str  # its kernel in an image, and what is beside it: an initrd, or a directory that is one
    initrd: str

    @property
    def features(self) -> Features:
        """What it can do on this host."""

    def check_host(self) -> None:
        """Raise HostError when this host cannot run the backend: asked before anything is built."""

    def check(self, spec: VmSpec) -> None:
        """Raise ConfigError or NixboxError for what no start of this machine gets over, from a template or not."""

    def expect(self, programs: Programs) -> None:
        """Tell which process of nixbox's own a machine will be, if it is one: it is made ready. Never raises."""

    def version(self) -> str:
        """The hypervisor's name and version: a saved VM is only ever restored by the same."""

    def shape(self, spec: VmSpec) -> list[str]:
        """Everything of a VM that its saved state depends on, without what is a machine's own (names, paths)."""

    def start(
        self,
        spec: VmSpec,
        sockets: Sockets,
        network: Network,
        log: Path,
        pass_fds: Sequence[int],
        programs: Programs | None = None,
    ) -> int:
        """Start a machine; returns its process id. The control socket accepts at once.

        It inherits `pass_fds`: the machine's lock, and whatever else lasts as long as it does. `programs` starts a
        process of nixbox's own, if the machine is one.
        """

    def pause(self, sockets: Sockets) -> None:
        """Stop the guest's CPUs; what it has written is in its disk's file."""

    def save(self, sockets: Sockets, memory: MemoryFile) -> bytes:
        """The state of a paused VM's devices; it is to be ended next. Its memory is in the file it was started with.

        `memory` is that file, a shared one. Raises NixboxError.
        """

    def load(self, sockets: Sockets, state: bytes) -> None:
        """Give a VM that was started with `incoming`, on its memory's file, its state; it stays paused."""

    def move(self, source: Sockets, target: Sockets) -> None:
        """Copy a paused VM's whole state, memory included, into one started with `incoming`, which does not run."""

    def status(self, sockets: Sockets) -> str:
        """`running`, or why it is not (`io-error`, `paused`, …)."""

    def resume(self, sockets: Sockets) -> None:
        """Let a paused machine, or one that stopped on a full host disk, go on."""

    def attach(self, sockets: Sockets, tag: str, connection: int) -> None:
        """Give a VM whose memory is shared a directory of the host; it is found under `tag` in the guest.

        `connection` is a descriptor: of a process that speaks vhost-user as a file system. Raises NixboxError.
        """

    def queues(self, sockets: Sockets, tag: str) -> tuple[Queue, ...]:
        """Where an attached directory's queues are in the guest's memory; none before the guest has set them up."""

    def detach(self, sockets: Sockets, tag: str) -> bool:
        """Take it away again; whether the guest let go of it, which it should have unmounted."""

    def quit(self, sockets: Sockets) -> None:
        """End the machine at once, its disks flushed."""
