"""A machine on the host: its directory, its record, and the locks that say whether it lives.

Liveness is an flock on `lock`, held by the VM process through an inherited descriptor: it lasts exactly as long
as the VM does, whatever becomes of the record. `busy` serialises the commands that change a machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nixbox import locks, paths
from nixbox.errors import NixboxError, NotRunningError
from nixbox.machine.backend import Sockets
from nixbox.plan.model import Shared
from nixbox.plan.network import Policy
from nixbox.values import asdict, dataclass, field, fields, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FORMAT = 1
GUARD_LOCK = "guard"  # in the runtime directory
_GUARD_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Record:
    """`machine.json`: what a machine is made of and how it was last started.

    `image` is a store path; `created_at` and `started_at` are seconds since the epoch; `ready` says that the last
    start came to its end; `pid` and `started_at` are those of the last start; `setup` is the hash of the
    setup that ran (None: none yet); `workspace` is where the machine was last started; `how` says how that went (see
    session.Up); `ephemeral` machines end with the command that they were made for; `env_hash` is that of the
    environment which the guest was given (see snapshot.env_hash); `return_memory` is the config's;
    `network` the policy that it was started with (plan.model.Policy). `mounts` are the host's directories that it has
    (Shared); `shares_memory` says that other processes than the hypervisor may see its memory, which these need.
    """

    name: str
    machine_id: str
    user: str
    created_at: int
    image: str
    backend: str
    accelerator: str
    vcpus: int
    memory_mib: int
    disk_mib: int
    ready: bool = False
    pid: int | None = None
    started_at: int | None = None
    setup: str | None = None
    workspace: str = ""
    how: str = ""
    ephemeral: bool = False
    env_hash: str = ""
    return_memory: bool = False
    network: dict[str, Any] = field(default_factory=dict)
    mounts: list[dict[str, Any]] = field(default_factory=list)
    shares_memory: bool = False
    format: int = FORMAT

    @property
    def policy(self) -> Policy:
        """`network`; nothing leaves a machine whose record does not tell."""
        return Policy.from_json(self.network) if self.network else Policy("off")

    @property
    def shared(self) -> list[Shared]:
        """`mounts`."""
        return [Shared(**mount) for mount in self.mounts]


class MachineDir:
    """The files of one machine: WORKSPACE/.nixbox/machines/NAME, or `path`."""

    def __init__(self, workspace: Path, name: str, path: Path | None = None) -> None:
        self.workspace = workspace
        self.name = name
        self.path = path or workspace / paths.CONFIG_DIR / "machines" / name
        self.record_file = self.path / "machine.json"
        self.overlay = self.path / "overlay.img"
        self.image_root = self.path / "image"
        self.ssh = self.path / "ssh"
        self.logs = self.path / "logs"
        self.console_log = self.logs / "console.log"
        self.setup_log = self.logs / "setup.log"
        self.vm_log = self.logs / "vm.log"
        self.run_link = self.path / "run"
        self.snapshot = self.path / "snapshot"
        self.paused = self.path / "paused"

    @property
    def runtime(self) -> Path:
        """The directory of the sockets: where the last start put it, whatever this process's environment says."""
        try:
            return self.run_link.readlink()
        except OSError:
            return paths.runtime_dir(self.path.parent, self.name)

    @property
    def sockets(self) -> Sockets:
        """The sockets of the running machine."""
        return Sockets.in_dir(self.runtime)

    @property
    def ssh_sockets(self) -> tuple[Path, Path]:
        """The sockets of the shared SSH connections: OpenSSH's, and nixbox's own."""
        return self.runtime / "mux", self.runtime / "x"

    def exists(self) -> bool:
        """Whether `nixbox up` has made this machine (its record is the last thing it writes)."""
        return self.record_file.is_file()

    def prepare(self) -> None:
        """Make the directories: keys and logs are for this user's eyes only. Not while a VM lives."""
        for directory in (self.path, self.ssh, self.logs):
            paths.private_dir(directory)
        paths.remove_tree(self.runtime)  # sockets of a start that was killed
        self.run_link.unlink(missing_ok=True)
        self.run_link.symlink_to(paths.private_dir(self.runtime))

    def rotate_logs(self) -> None:
        """Keep the console and the hypervisor's output of the last start as `*.old`, and begin new ones."""
        for log in (self.console_log, self.vm_log):
            if log.exists():
                log.replace(log.with_suffix(".log.old"))

    def load(self) -> Record:
        """Read the record. Raises NotRunningError when there is none, NixboxError when it is damaged."""
        try:
            data = json.loads(self.record_file.read_text())
        except FileNotFoundError:
            raise NotRunningError(
                f"there is no machine `{self.name}` in {self.workspace}", hint="`nixbox up` makes one"
            ) from None
        except ValueError:
            data = None
        known = {field.name for field in fields(Record)}
        try:
            if isinstance(data, dict) and data.get("format") == FORMAT and set(data) <= known:
                return Record(**data)
        except TypeError:  # a field is missing
            pass
        raise NixboxError(
            f"{self.record_file} is damaged or was written by another nixbox",
            hint=f"its disk is untouched; `nixbox rm {self.name}` removes the machine, or restore the file",
        )

    def load_or_none(self) -> Record | None:
        """The record, or None where there is none that can be read: what stops or removes a machine needs none."""
        try:
            return self.load()
        except NixboxError:
            return None

    def save(self, record: Record) -> None:
        """Write the record whole or not at all."""
        paths.write_atomic(self.record_file, json.dumps(asdict(record), indent=2) + "\n", mode=0o600)

    def update(self, **changes: object) -> Record:
        """Change fields of the record."""
        record = replace(self.load(), **changes)  # type: ignore[arg-type]
        self.save(record)
        return record

    def alive(self) -> bool:
        """Whether a VM process of this machine lives."""
        return locks.held(self.path / "lock")

    @contextmanager
    def hold_lock(self) -> Iterator[int]:
        """Take the liveness lock; the descriptor is for the VM process to inherit."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = _above_stdio(os.open(self.path / "lock", flags, 0o600))
        try:
            # Whoever only asks holds it for microseconds; a VM would have been seen by alive().
            _flock(fd, wait_s=2)
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def busy(self, on_wait: Callable[[], None], wait_s: float = 600) -> Iterator[None]:
        """One command at a time may change a machine; `on_wait` is called once when another one is at it."""
        told = False
        while True:
            paths.private_dir(self.path)
            fd = os.open(self.path / "busy", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not told:
                        on_wait()
                    told = True
                    _flock(fd, wait_s)
                if self._is_busy_file(fd):
                    yield
                    return
                # `rm` removed the file that we waited for: begin again with the one that counts.
            finally:
                os.close(fd)

    def is_busy(self) -> bool:
        """Whether a command is changing the machine at this moment."""
        return locks.held(self.path / "busy")

    def remove_if_idle(self) -> None:
        """Remove the machine unless a command is at work on it, or is just about to begin or to end."""
        try:
            fd = os.open(self.path / "busy", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            with contextlib.suppress(OSError):
                if time.time() - self.path.stat().st_mtime > 60:
                    self.remove()
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_busy_file(fd):
                self.remove()
        except BlockingIOError:
            return
        finally:
            os.close(fd)

    def _is_busy_file(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), (self.path / "busy").stat())
        except FileNotFoundError:
            return False

    def remove(self) -> None:
        """Remove every file of the machine."""
        import shutil

        paths.remove_tree(self.runtime)
        paths.remove_tree(paths.runtime_dir(self.path, self.name))  # of a copy that was cut off
        # The record goes first: what is left of an interrupted removal is no machine any more.
        self.record_file.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):  # somebody else is at it
            shutil.rmtree(self.path)

    def clean_runtime(self) -> None:
        """Remove the sockets of a VM that is gone, once the process that watched over its network has followed it."""
        self._await_guard()
        paths.remove_tree(self.runtime)
        self.paused.unlink(missing_ok=True)

    def _await_guard(self) -> None:
        """It holds a lock as long as it lives, and ends a moment after the VM (see network.watch)."""
        with contextlib.suppress(OSError), (self.runtime / GUARD_LOCK).open("rb") as file:
            end = time.monotonic() + _GUARD_TIMEOUT_S
            while time.monotonic() < end:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                time.sleep(0.002)

    def kill(self, sig: signal.Signals, wait_s: float) -> bool:
        """Signal the VM process and wait until the lock is free; returns whether it is."""
        signal_holders(self.path / "lock", sig)
        return self.wait_gone(wait_s)

    def wait_gone(self, wait_s: float) -> bool:
        """Wait until no VM process lives; returns whether that came true within the bound."""
        deadline = time.monotonic() + wait_s
        while self.alive():
            if time.monotonic() > deadline:
                return False
            # flock has no timed wait and no descriptor to poll.
            time.sleep(0.01)
        return True


def holders(lock: Path) -> list[int]:
    """The processes that have a lock's file open (Linux: /proc), without this one."""
    try:
        wanted = lock.stat()
    except FileNotFoundError:
        return []
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        pid = int(process.name)
        if pid != os.getpid() and _has_open(process, wanted):
            found.append(pid)
    return found


def signal_holders(lock: Path, sig: signal.Signals) -> None:
    """Signal every process that has a lock's file open.

    The signal goes through a pidfd that is taken before the process is checked to hold our lock, so a reused process
    id is never hit.
    """
    for pid in holders(lock):
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if pid in holders(lock):
                signal.pidfd_send_signal(pidfd, sig)
        except ProcessLookupError:
            continue
        finally:
            os.close(pidfd)


def _above_stdio(fd: int) -> int:
    """The same open file as descriptor 3 or higher: in a child, 0 to 2 become its standard streams."""
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


def _has_open(process: Path, wanted: os.stat_result) -> bool:
    try:
        for link in (process / "fd").iterdir():
            try:
                found = link.stat()
            except OSError:
                continue
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    except OSError:  # gone, or somebody else's
        return False
    return False


def _flock(fd: int, wait_s: float) -> None:
    """Take an exclusive lock within a bound. Raises NixboxError when somebody keeps it longer."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise NixboxError(
                    f"another nixbox command has been at work on this machine for {wait_s:g} s",
                    hint="`nixbox status` says what runs",
                ) from None
            time.sleep(0.02)


def new_machine_id() -> str:
    """A random machine-id: 32 hexadecimal digits (machine-id(5))."""
    return os.urandom(16).hex()


def all_machines(workspace: Path) -> list[MachineDir]:
    """Every machine of a workspace, by name."""
    directory = workspace / paths.CONFIG_DIR / "machines"
    if not directory.is_dir():
        return []
    found = [MachineDir(workspace, entry.name) for entry in sorted(directory.iterdir()) if entry.is_dir()]
    return [machine for machine in found if machine.exists()]
