"""Directories of the host in a machine: shared when it starts, added and taken away while it runs, healed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nixbox import jails, locks, paths
from nixbox.config.settings import Mount
from nixbox.errors import ConfigError, HostError, NixboxError
from nixbox.guest import control
from nixbox.image import store
from nixbox.image.build import Image
from nixbox.machine import record as records
from nixbox.machine.backend import slot_tag
from nixbox.mounts import daemon, health, places, standin
from nixbox.plan.model import Shared
from nixbox.session import net
from nixbox.values import asdict, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nixbox.machine.backend import Backend
    from nixbox.machine.record import MachineDir, Record
    from nixbox.mounts.places import Place
    from nixbox.report import Reporter

_GUEST_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 5.0


def resolve(mounts: Sequence[Mount], workspace: Path, fields: Sequence[str] = ()) -> list[Place]:
    """Look at what is to be shared. Raises ConfigError with every fault."""
    if not mounts:
        return []
    own = places.own_directories(workspace)
    root = store.private_root()
    return places.resolve(mounts, workspace, [*own, *([root] if root else [])], fields)


def wanted(configured: Sequence[Place], old: Record | None) -> list[dict[str, Any]]:
    """All that a machine is to have, for its record: the config's, and what was added before and is still there."""
    found = {place.mount.target: shared(place) for place in configured}
    for one in old.shared if old is not None else []:
        if one.added and Path(one.source).is_dir():
            found.setdefault(one.target, replace(one, tag=""))
    return [asdict(one) for one in found.values()]


def shared(place: Place, *, added: bool = False) -> Shared:
    """A place as a record has it."""
    mount, inode = place.mount, place.inode
    here = (mount.source, str(place.source), inode.device, inode.number)
    return Shared(*here, mount.target, mount.readonly, added)


class Shares:
    """The shared directories of one machine, on their way into its guest: `serve`, `plug`, `mount`, in that order."""

    def __init__(self, machine: MachineDir, backend: Backend, image: Image) -> None:
        self.machine = machine
        self.backend = backend
        self.image = image
        self._served: list[tuple[Shared, daemon.Daemon | None]] = []
        # For a hypervisor that serves them itself: what it is told, and locks that it is to hold.
        self.given: list[jails.Share] = []
        self.locks: list[int] = []

    def serve(self, listed: Sequence[Shared]) -> None:
        """Start a process for each, unless the hypervisor is to serve them. Raises ConfigError, HostError."""
        self._served.clear()  # of a start that failed before this one
        self.given.clear()
        workspace, runtime = self.machine.workspace, self.machine.runtime
        if not listed:
            paths.remember(workspace.resolve())
            return
        mounts = [Mount(one.source, one.target, one.readonly) for one in listed]
        added = {one.target for one in listed if one.added}
        found = resolve(mounts, workspace, [one.target for one in listed])
        plugs = self.backend.features.hot_plug
        chosen = daemon.program(self._tools()) if plugs else None
        writable = {}
        for number, place in enumerate(found):
            # The devices of a hypervisor that plugs nothing in are those of its template, their names as well.
            tag = f"nixbox-{os.urandom(4).hex()}" if plugs else slot_tag(number)
            named = replace(shared(place, added=place.mount.target in added), tag=tag)
            started = None
            if chosen is not None:
                started = daemon.start(chosen, place, runtime, tag, self.machine.logs / "mounts.log")
            else:
                self.locks.append(health.hold(runtime, tag))
                self.given.append(place.share)
            self._served.append((named, started))
            if not named.readonly:
                writable[place.source] = health.lock_file(runtime, tag)
        paths.remember(workspace.resolve(), writable)  # before any guest can write there

    def _tools(self) -> Path | None:
        try:
            return self.image.file("host")
        except FileNotFoundError:  # of a suite that has none, or of another base
            return None

    def plug(self) -> None:
        """Hand each to the hypervisor. Raises HostError with the process's own words when it could not start."""
        for one, started in self._served:
            if started is None:  # it was there from the start
                continue
            with started.connection:
                try:
                    self.backend.attach(self.machine.sockets, one.tag, started.connection.fileno())
                except NixboxError as error:
                    said = "".join(f"\n  {line}" for line in control.tail(self.machine.logs / "mounts.log", 3))
                    raise HostError(f"{one.source} cannot be shared: {error.message}{said}") from None

    @property
    def listed(self) -> list[Shared]:
        """Those that are served, each with its tag."""
        return [one for one, _ in self._served]

    def mount(self, channel: control.Control, report: Reporter | None = None) -> None:
        """Let the guest mount each. Raises ConfigError when it cannot; with `report` that is only said."""
        for one, _ in self._served:
            try:
                channel.mount(one.tag, one.target, readonly=one.readonly, timeout_s=_GUEST_TIMEOUT_S)
            except control.GuestError as error:
                words = f"the guest cannot mount {one.source} at {one.target}: {error.message}"
                if report is None:
                    raise ConfigError(words, hint="is the target a directory that can be made?") from None
                report.note(f"warning: {words}")

    def watch(self) -> None:
        """Let the machine's guard watch over the processes: should one end, those in the guest get errors."""
        for one, started in self._served:
            if started is not None:
                _watch(self.machine, self.backend, one.tag, started.pid)

    def started(self) -> None:
        """The hypervisor holds its locks by now, or has failed to start."""
        while self.locks:
            os.close(self.locks.pop())

    def abandon(self) -> None:
        """After a failure: end what was started."""
        for one, started in self._served:
            if started is None:
                continue
            started.connection.close()
            records.signal_holders(health.lock_file(self.machine.runtime, one.tag), signal.SIGKILL)


def _watch(machine: MachineDir, backend: Backend, tag: str, pid: int) -> None:
    device = standin.collect(pid, backend.queues(machine.sockets, tag))
    if device is None:  # it has ended at once; `status` says so
        return
    try:
        pidfd = os.pidfd_open(pid)
        try:
            what = {"tag": tag, "queues": device.as_json()}
            net.ask(machine, (pidfd, device.memory, *device.events), watch=what)
        finally:
            os.close(pidfd)
    except ProcessLookupError:
        return
    finally:
        device.close()


def watch_again(machine: MachineDir, backend: Backend, record: Record) -> None:
    """Tell a guard that was started anew what there is to watch over."""
    if not backend.features.hot_plug:
        return
    for one in record.shared:
        for pid in records.holders(health.lock_file(machine.runtime, one.tag)) if one.tag else []:
            _watch(machine, backend, one.tag, pid)


# --- while it runs, all under the busy lock ---


def add(machine: MachineDir, backend: Backend, listed: Sequence[Shared]) -> None:
    """Share further directories with a running machine. Raises ConfigError, HostError."""
    _check_plugs(machine, backend)
    record = machine.load()
    if not record.shares_memory:
        raise ConfigError(
            f"`{machine.name}` was started without any mount, so its memory is its own and none can be added",
            hint="put one into [[mounts]] of .nixbox/config.toml, then `nixbox down` and `nixbox up`",
        )
    shares = Shares(machine, backend, Image(Path(record.image), machine.image_root, fresh=False))
    try:
        shares.serve(listed)
        shares.plug()
        with control.Control.connect(machine.sockets.control) as channel:
            shares.mount(channel)
            shares.watch()
    except BaseException:
        # Before their processes end: a guest that is just mounting one would wait for ever.
        for one in shares.listed:
            _withdraw(machine, backend, one.tag)
        shares.abandon()
        raise
    targets = {one.target for one in listed}
    kept = [one for one in record.shared if one.target not in targets]
    machine.update(mounts=[asdict(one) for one in (*kept, *shares.listed)])


def _check_plugs(machine: MachineDir, backend: Backend) -> None:
    if not backend.features.hot_plug:
        raise ConfigError(
            f"`{machine.name}` runs on {backend.name}, where directories neither come nor go while it runs",
            hint="change [[mounts]] in .nixbox/config.toml, then `nixbox down` and `nixbox up`; or `--backend qemu`",
        )


def mount(machine: MachineDir, backend: Backend, source: str, target: str, *, readonly: bool) -> Path:
    """Share a directory (relative to the current one) with a running machine; returns its real path."""
    from nixbox.config.fields import guest_path_fault

    fault = guest_path_fault(target)
    if fault:
        raise ConfigError(fault, hint="write it as /srv/data or ~/data")
    asked = Mount(str(Path.cwd() / Path(source).expanduser()), target.rstrip("/"), readonly)
    (place,) = resolve([asked], machine.workspace, ["mount"])
    record = machine.load()
    for one in record.shared:
        if places.guest_path(one.target, record.user) == places.guest_path(target, record.user) and one.tag:
            raise ConfigError(
                f"{one.source} is mounted at {one.target} already", hint=f"`nixbox unmount {one.target}` first"
            )
    add(machine, backend, [shared(place, added=True)])
    return place.source


def follow(machine: MachineDir, backend: Backend, configured: Sequence[Place], report: Reporter) -> bool:
    """Share what the config of a running machine has come to name; whether it now has what the config says."""
    record = machine.load()
    have = {places.guest_path(one.target, record.user) for one in record.shared}
    for place in configured:
        if places.guest_path(place.mount.target, record.user) not in have and record.shares_memory:
            add(machine, backend, [shared(place)])
            report.note(f"{place.source} is mounted at {place.mount.target}")
    named = {place.mount.target: (str(place.source), place.mount.readonly) for place in configured}
    now = {one.target: (one.real, one.readonly) for one in machine.load().shared}
    extra = {one.target for one in record.shared if one.added} - set(named)
    return named == {target: what for target, what in now.items() if target not in extra}


def take(machine: MachineDir, backend: Backend, one: Shared, *, force: bool) -> None:
    """Take a directory away from a running machine: when this returns its guest cannot reach it any more.

    Raises GuestError when it is in use there, unless `force` is set.
    """
    if not one.tag:
        return
    try:
        with control.Control.connect(machine.sockets.control) as channel:
            channel.unmount(one.tag, one.target, force=force, timeout_s=_GUEST_TIMEOUT_S)
    except NixboxError:
        if not force:
            raise
    _withdraw(machine, backend, one.tag)


def _withdraw(machine: MachineDir, backend: Backend, tag: str) -> None:
    """End a device and its process. A guest that does not let go loses it all the same."""
    lock = health.lock_file(machine.runtime, tag)
    if backend.detach(machine.sockets, tag):
        with contextlib.suppress(NixboxError):  # a guard that was killed has nothing to forget
            net.ask(machine, forget=tag)
    else:
        records.signal_holders(lock, signal.SIGKILL)
    end = time.monotonic() + _END_TIMEOUT_S
    while health.lives(machine.runtime, tag):  # it ends by itself when it is let go of
        if time.monotonic() > end:
            records.signal_holders(lock, signal.SIGKILL)
            break
        time.sleep(0.002)
    lock.unlink(missing_ok=True)


def remove(machine: MachineDir, backend: Backend, target: str, *, force: bool) -> Shared | None:
    """Take the directory at a target away; None when there is none. Raises GuestError when it is in use."""
    _check_plugs(machine, backend)
    record = machine.load()
    where = places.guest_path(target, record.user)
    for one in record.shared:
        inside = places.guest_path(one.target, record.user)
        if inside.startswith(f"{where}/") and one.tag:
            raise ConfigError(f"{one.target} is mounted inside {target}", hint=f"`nixbox unmount {one.target}` first")
    for one in record.shared:
        if places.guest_path(one.target, record.user) == where:
            take(machine, backend, one, force=force)
            machine.update(mounts=[asdict(other) for other in record.shared if other != one])
            return one
    return None


def heal(machine: MachineDir, backend: Backend, report: Reporter) -> None:
    """Share again what a running machine has lost, if it is there to be shared."""
    if not backend.features.hot_plug:
        return
    record = machine.load()
    for lock in machine.runtime.glob("nixbox-*.lock"):  # of a command that was killed in the middle
        if lock.stem not in {one.tag for one in record.shared} and locks.held(lock):
            _withdraw(machine, backend, lock.stem)
    broken = [(one, health.trouble(machine.runtime, one)) for one in record.shared]
    lost = [places.guest_path(one.target, record.user) for one, why in broken if why and Path(one.source).is_dir()]
    for one, why in broken:
        where = places.guest_path(one.target, record.user)
        # What is mounted inside one that is taken away goes with it.
        if where in lost or (why is None and any(where.startswith(f"{outer}/") for outer in lost)):
            take(machine, backend, one, force=True)
            _bring_back(machine, backend, one, why, report)


def _bring_back(machine: MachineDir, backend: Backend, one: Shared, why: str | None, report: Reporter) -> None:
    try:
        add(machine, backend, [one])
    except NixboxError as error:
        report.note(f"warning: {one.target} is not mounted any more: {error.message}; `nixbox up` tries again")
    else:
        if why:
            report.note(f"{one.source} is mounted again at {one.target}: {why}")


@contextmanager
def away(machine: MachineDir, backend: Backend, report: Reporter) -> Iterator[None]:
    """While the body runs, a running machine has none of its directories: such devices cannot be saved.

    Afterwards it has them again if it still lives.
    """
    record = machine.load()
    for one in record.shared:
        take(machine, backend, one, force=True)
    machine.update(mounts=[asdict(replace(one, tag="")) for one in record.shared])
    try:
        yield
    finally:
        if machine.alive() and not machine.paused.exists():
            for one in record.shared:
                _bring_back(machine, backend, one, None, report)
