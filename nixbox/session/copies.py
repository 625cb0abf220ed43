"""Copies of a running guest: its own state on the disk (suspend), and further machines that go on from it (fork)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nixbox import paths
from nixbox.errors import ConfigError, HostError
from nixbox.guest import control
from nixbox.machine import backends, record, saved, snapshot, template, usage
from nixbox.machine.backend import MemoryFile
from nixbox.network.watch import Watch
from nixbox.report import Phases
from nixbox.session import mounts, stop
from nixbox.session.start import Restored, Start, own_memory
from nixbox.values import dataclass, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nixbox.machine.record import MachineDir, Record


_SYNC_TIMEOUT_S = 120.0


def capture(start: Start, memory: MemoryFile, pass_fds: tuple[int, ...] = ()) -> bytes:
    """Pause a guest, bring its memory into a file, and return the state of its devices.

    A second QEMU takes the guest over from the first, its memory in the file, and saves it as a template is saved. It
    never runs. So whatever the guest's memory was, what comes out is one format, which is mapped and not read when a
    machine is restored from it.
    """
    path = start.machine.path / "copy"
    keeper = record.MachineDir(start.machine.path, start.machine.name, path)
    stop.abandon(keeper, start.backend)  # of a command that was killed: it may still be ending
    keeper.prepare()
    with keeper.overlay.open("wb") as disk:
        disk.truncate(start.machine.overlay.stat().st_size)  # never read or written: the guest does not run
    keeper.save(start.record)
    other = replace(start, machine=keeper, phase=Phases(), bound=True, watch=Watch(), ahead=[])
    try:
        other.launch(other.spec(memory, incoming=True), pass_fds)
        start.backend.pause(start.machine.sockets)
        start.backend.move(start.machine.sockets, keeper.sockets)
        return start.backend.save(keeper.sockets, memory)
    finally:
        stop.abandon(keeper, start.backend)
        keeper.remove()


# --- suspend and resume ---


def wanted(start: Start) -> snapshot.Manifest:
    """What `snapshot.json` has to say for the machine as it is now."""
    version = snapshot.hypervisor_version(
        start.backend.version(),
        template.host_cpu(start.record.accelerator),
        start.backend.shape(start.spec()),
    )
    return snapshot.Manifest(
        imageHash=snapshot.image_hash(start.record.image),
        overlayFingerprint=snapshot.overlay_fingerprint(start.machine.overlay),
        envHash=start.record.env_hash,
        hypervisorVersion=version,
        createdAt=snapshot.now(),
    )


def suspend(start: Start) -> None:
    """Save a running machine. It is paused, and its snapshot is whole, when this returns; then it may be ended."""
    machine = start.machine
    new = machine.path / "snapshot.new"
    snapshot.remove(new)
    snapshot.remove(machine.snapshot)
    used = usage.of(start.record.pid) if start.record.pid is not None else None
    needed_bytes = used.resident if used is not None else start.record.memory_mib << 20
    # A mapped file on a full disk is a SIGBUS, not an error that could be told.
    paths.require_space(machine.path, min(needed_bytes, start.record.memory_mib << 20), "the machine's memory")
    new.mkdir(mode=0o700)
    with mounts.away(machine, start.backend, start.report):
        _suspend(start, new)


def _suspend(start: Start, new: Path) -> None:
    machine = start.machine
    with control.Control.connect(machine.sockets.control) as channel:
        channel.sync(_SYNC_TIMEOUT_S)  # if the snapshot cannot be used one day, the disk alone must do
    try:
        machine.paused.touch(mode=0o600)
        saved.create(new / "memory").close()
        state = capture(start, MemoryFile(new / "memory", shared=True))
        with saved.create(new / "state") as file:
            file.write(state)
        saved.seal(new, ["memory", "state"])
        snapshot.write(new, wanted(start))
        new.rename(machine.snapshot)
    except BaseException:
        snapshot.remove(new)
        if machine.alive():
            start.backend.resume(machine.sockets)
            machine.paused.unlink()
        raise


def resumable(start: Start) -> list[str] | None:
    """Why the machine's snapshot may not be used (empty: it may); None when there is none."""
    kept = snapshot.read(start.machine.snapshot)
    if kept is None or (kept.invalidateReasons and not (start.machine.snapshot / "memory").exists()):
        return None  # none, or one that has been said to be of no use before
    why = snapshot.reasons(start.machine.snapshot, kept, wanted(start))
    if why:
        snapshot.invalidate(start.machine.snapshot, kept, why)
    return why


def resume(start: Start) -> Restored:
    """Go on from the machine's snapshot."""
    directory = start.machine.snapshot
    state = (directory / "state").read_bytes()
    memory = os.open(directory / "memory", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return start.restore_from(memory, state, going_on=lambda: snapshot.going_on(directory))
    finally:
        os.close(memory)


# --- fork ---


@dataclass(frozen=True, slots=True)
class Copy:
    """A running guest as it was for one moment: memory (a descriptor) and devices. Its disks are copied already."""

    memory: int
    state: bytes

    def start(self, child: Start) -> Restored:
        """Let a machine go on from here."""
        return child.restore_from(self.memory, self.state)


@contextmanager
def copied(parent: Start, children: list[MachineDir]) -> Iterator[Copy]:
    """Copy a running guest, which stands still meanwhile, and give each of `children` a copy of its disk.

    The memory is in no file system: it goes when the last machine that began with it has ended.
    """
    memory = os.memfd_create("nixbox-fork", os.MFD_CLOEXEC)
    try:
        state = _captured(parent, children[0], memory)
        for child in children[1:]:
            saved.copy(children[0].overlay, child.overlay)
        yield Copy(memory, state)
    finally:
        os.close(memory)


def _captured(parent: Start, child: MachineDir, memory: int) -> bytes:
    machine = parent.machine
    with own_memory(parent.record.memory_mib) as whole:
        with mounts.away(machine, parent.backend, parent.report):
            # If we are killed from here on, the next command on the machine lets it go on.
            machine.paused.touch(mode=0o600)
            try:
                state = capture(parent, MemoryFile.of(whole, shared=True), (whole,))
                saved.copy(machine.overlay, child.overlay)
            finally:
                if machine.alive():
                    parent.backend.resume(machine.sockets)
                machine.paused.unlink(missing_ok=True)
        # QEMU has looked at every page, and a memfd keeps what was looked at.
        saved.compact(whole, memory)
    return state


def claim_names(workspace: Path, prefix: str, count: int) -> list[str]:
    """Make the directories of `count` machines PREFIX-1, PREFIX-2, …, passing over those that are there.

    Whoever else asks at the same time gets others. Raises ConfigError for a bad prefix.
    """
    from nixbox.config import names

    machines = paths.private_dir(workspace / paths.CONFIG_DIR / "machines")
    found: list[str] = []
    number = 0
    while len(found) < count:
        number += 1
        name = names.check_name(f"{prefix}-{number}", "machine name")
        with contextlib.suppress(FileExistsError):
            (machines / name).mkdir(mode=0o700)
            found.append(name)
    return found


def tell_what_it_needs(start: Start, environ: Mapping[str, str]) -> None:
    """A machine that options of `up` shaped is resumed with the same ones only: say so while it can be helped."""
    from nixbox.config.settings import resolve_env

    settings, known = start.settings, start.record
    try:
        env = snapshot.env_hash(known.machine_id, resolve_env(settings, environ))
    except ConfigError:
        env = ""
    shape = (settings.vcpus, settings.memory_mib)
    if env != known.env_hash or (known.vcpus, known.memory_mib) != shape:
        start.report.note(
            "note: it was started with other resources or variables than the config has; only an `up` with the "
            "same ones resumes it, any other starts it from its disk"
        )


def check_saves(running: Record) -> None:
    """Raise HostError for a machine whose hypervisor cannot save it."""
    if not backends.named(running.backend).features.restore:
        raise HostError(
            f"`{running.name}` runs on {running.backend}, which can neither suspend nor copy a running machine",
            hint="`nixbox down`, then `nixbox up --backend qemu`; a stopped machine's disk can be forked as it is",
        )
