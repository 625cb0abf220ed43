"""One start of one VM: from nothing, from a template, or from a saved state, up to an SSH connection.

Whatever it starts from, the guest is told its identity by the same `go` and answers with the same `ready`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property

from nixbox import sparse
from nixbox.errors import ConfigError, NixboxError
from nixbox.guest import control, ssh
from nixbox.machine import overlay
from nixbox.machine.backend import MemoryFile, VmSpec
from nixbox.network import namespace, policy
from nixbox.network.watch import Watch
from nixbox.programs import Programs
from nixbox.report import Phases
from nixbox.session import mounts, net
from nixbox.values import asdict, dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Self

    from nixbox.config.settings import Settings
    from nixbox.image.build import Image
    from nixbox.machine.backend import Backend
    from nixbox.machine.record import MachineDir, Record
    from nixbox.report import Reporter

# A guest under software emulation on a busy host may take a minute; a bound, not an expectation.
BOOT_TIMEOUT_S = 240.0
# One that goes on from a saved state has next to nothing to do.
RESTORE_TIMEOUT_S = 60.0


@contextmanager
def own_copy(fd: int) -> Iterator[int]:
    """A copy in memory of a file (a descriptor) with all its holes; it lasts as long as a VM that maps it."""
    copy = os.memfd_create("nixbox-memory", os.MFD_CLOEXEC)
    try:
        sparse.copy_data(fd, copy)
        yield copy
    finally:
        os.close(copy)


@contextmanager
def own_memory(mib: int) -> Iterator[int]:
    """Memory for a guest that boots and that others than the hypervisor have to see; it lasts as long as the VM."""
    memory = os.memfd_create("nixbox-memory", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memory, mib << 20)
        yield memory
    finally:
        os.close(memory)


@dataclass(frozen=True, slots=True)
class Restored:
    """A guest that goes on from a saved state and does not know yet who it is; a context manager.

    `shell` is for nixbox's own SSH connection, unless that was begun; `held` as for Start.restore_from.
    """

    start: Start
    channel: control.Control
    shell: socket.socket | None
    held: bool

    def __enter__(self) -> Restored:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        if self.shell is not None:
            self.shell.close()

    def tell(self, how: control.How) -> None:
        """Send the guest its identity."""
        self.channel.go(self.start.go(how, restored=True))

    def ready(self, *, lenient: bool = False) -> str:
        """Wait until it is that machine, and begin to open nixbox's own SSH connection if that is still to be done.

        Returns the hash of the setup that ran on its disk, or `-`.
        """
        done = self.start.answer(self.channel, RESTORE_TIMEOUT_S, lenient=lenient)
        if self.shell is not None:
            if not self.held:
                ssh.drop_stale(self.shell)
            self.start.connect(self.shell)
        return done


def _cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Opened:
    """A network namespace whose guard was begun, and a pipe that tells the guard when its machine has ended.

    A context manager: whoever starts the VM in it lets it inherit `alive`, and lets go of everything.
    """

    network: namespace.Namespace
    alive: int

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.alive)
        self.network.__exit__(None, None, None)


@dataclass(frozen=True)
class Start:
    """All that a start needs to know.

    `env` maps names to values that are for this machine's guest alone; `devices_of` is the record of the machine
    whose devices this one has to have, if that is another.
    """

    machine: MachineDir
    record: Record
    image: Image
    backend: Backend
    settings: Settings
    env: Mapping[str, str]
    report: Reporter
    phase: Phases = field(default_factory=Phases)
    bound: bool = False
    devices_of: Record | None = None
    watch: Watch = field(default_factory=Watch)
    programs: Programs = field(default_factory=Programs)
    ahead: list[Opened] = field(default_factory=list)

    @cached_property
    def shares(self) -> mounts.Shares:
        """The host's directories that the machine has."""
        return mounts.Shares(self.machine, self.backend, self.image)

    def spec(self, memory: MemoryFile | None = None, *, incoming: bool = False) -> VmSpec:
        """The VM that the record describes."""
        mounts = (self.devices_of or self.record).mounts
        return VmSpec(
            name=self.machine.name,
            kernel=self.image.file(self.backend.kernel),
            initrd=self.image.file(self.backend.initrd),
            root=self.image.file("root.img"),
            overlay=self.machine.overlay,
            console_log=self.machine.console_log,
            vcpus=self.record.vcpus,
            memory_mib=self.record.memory_mib,
            disk_mib=self.record.disk_mib,
            accelerator=self.record.accelerator,  # type: ignore[arg-type]
            memory_file=memory,
            incoming=incoming,
            bound=self.bound,
            return_memory=self.record.return_memory,
            slots=0 if self.backend.features.hot_plug else len(mounts),
            shares=tuple(self.shares.given),
            sidecars=self.image.sidecars,
        )

    def open_network(self) -> Opened:
        """Make the machine's network namespace and begin its guard. Raises HostError."""
        machine = self.machine
        machine.rotate_logs()
        with ExitStack() as undo:
            network = undo.enter_context(namespace.create(self.programs))
            ended, alive = os.pipe()  # the VM's process gets the one end; the guard sees when nobody has it any more
            undo.callback(os.close, alive)
            try:
                self.watch.begin(machine.name, net.files(machine), network.user, network.net, ended, self.programs)
            finally:
                os.close(ended)
            undo.pop_all()
        return Opened(network, alive)

    @contextmanager
    def network_ahead(self) -> Iterator[None]:
        """Have the first launch's network made while what it is to start from is still looked for."""
        self.ahead.append(self.open_network())
        try:
            yield
        finally:
            for unused in self.ahead:
                unused.__exit__(None, None, None)
            self.ahead.clear()

    def launch(self, spec: VmSpec, pass_fds: Sequence[int] = ()) -> None:
        """Start the hypervisor in a network namespace of its own, with its guard; from here on the machine lives."""
        machine = self.machine
        with self.ahead.pop() if self.ahead else self.open_network() as opened, machine.hold_lock() as lock_fd:
            try:
                passed = (lock_fd, opened.alive, *self.shares.locks, *pass_fds)
                started = (spec, machine.sockets, opened.network, machine.vm_log, passed, self.programs)
                pid = self.backend.start(*started)
            finally:
                self.shares.started()
        machine.update(pid=pid, started_at=int(time.time()))

    def boot(self, memory: MemoryFile | None = None) -> control.Control:
        """Start from nothing, up to the guest's `boot`; returns the channel, on which `go` is to follow."""
        plugs = self.backend.features.hot_plug
        with self.phase("boot"), ExitStack() as undo:
            if not plugs:  # the hypervisor serves them from the start
                self.shares.serve(self.record.shared)
            if memory is None and self.record.shares_memory:
                with own_memory(self.record.memory_mib) as own:
                    self.launch(self.spec(MemoryFile.of(own, shared=True)), (own,))
            else:
                self.launch(self.spec(memory))
            undo.callback(self.shares.abandon)
            if plugs:
                self.shares.serve(self.record.shared)
            ssh.make_keys(self.machine.ssh)
            try:
                channel = control.Control.connect(self.machine.sockets.control)
            except control.GuestError as error:
                raise self.explained(error) from None
            try:
                version = channel.expect("boot", BOOT_TIMEOUT_S)
                if version != control.PROTOCOL:
                    raise control.GuestError(f"the image speaks control protocol {version}; rebuild it")
                self.shares.plug()
            except control.GuestError as error:
                channel.close()
                raise self.explained(error) from None
            except BaseException:
                channel.close()
                raise
            undo.pop_all()
        return channel

    def restore_from(
        self, memory: int, state: bytes, *, held: bool = False, going_on: Callable[[], None] = lambda: None
    ) -> Restored:
        """Go on from a saved state; what comes back holds the channel, on which `go` is to follow.

        `memory` is a file (a descriptor) that others may map too. `held`: the guest's SSH server waits for its key,
        connected to its host; ours takes that host's place. `going_on` is called before the guest goes on.
        """
        if not (self.record.return_memory or self.record.shares_memory):
            common = MemoryFile.of(memory, shared=False)
            return self.restore(common, state, (memory,), held=held, going_on=going_on)
        # Holes will be made in it, or others than the hypervisor have to see it: it must be this machine's alone.
        with own_copy(memory) as copy:
            own = MemoryFile.of(copy, shared=True)
            return self.restore(own, state, (copy,), held=held, going_on=going_on)

    def restore(
        self,
        memory: MemoryFile,
        state: bytes,
        pass_fds: Sequence[int] = (),
        *,
        held: bool = False,
        going_on: Callable[[], None] = lambda: None,
    ) -> Restored:
        """`restore_from` with memory as it is."""
        sockets, plugs = self.machine.sockets, self.backend.features.hot_plug
        with self.phase("restore"), ExitStack() as undo:
            if not plugs:  # the hypervisor serves them from the start
                self.shares.serve(self.record.shared)
            self.launch(self.spec(memory, incoming=True), pass_fds)
            undo.callback(self.shares.abandon)
            ssh.make_keys(self.machine.ssh)  # a new machine's, while the hypervisor comes up
            if plugs:
                self.shares.serve(self.record.shared)
            # First the channels: the guest then finds its host where it was. One that came later would be missed: a
            # guest that was saved connected goes on talking, and what nobody takes is lost.
            channel = undo.enter_context(control.Control.connect(sockets.control))
            shell = undo.enter_context(ssh.connected(sockets.shell))
            self.backend.load(sockets, state)
            self.shares.plug()
            going_on()
            self.backend.resume(sockets)
            at_once = held and _cpus() > 1  # with one, it would only keep the guest from getting ready
            if at_once:
                self.connect(shell)
            undo.pop_all()
        return Restored(self, channel, None if at_once else shell, held)

    def identify(self, channel: control.Control) -> str:
        """Tell a booting guest who it is; returns the hash of the setup that ran on its disk, or `-`."""
        with self.phase("go"):
            channel.go(self.go("boot", restored=False))
            return self.answer(channel, BOOT_TIMEOUT_S)

    def answer(self, channel: control.Control, timeout_s: float, *, lenient: bool = False) -> str:
        """Wait for the guest's `ready`, and let it mount the host's directories; `lenient`: it may fail to.

        Returns the hash of the setup that ran on its disk, or `-`.
        """
        try:
            done = channel.expect("ready", timeout_s)
        except control.GuestError as error:
            raise self.explained(error) from None
        # What a machine that was suspended has in its memory is worth more than a mount.
        self.shares.mount(channel, self.report if lenient else None)
        return done

    def connect(self, transport: socket.socket | None = None) -> None:
        """Begin to open nixbox's own SSH connection."""
        machine, sockets, record = self.machine, self.machine.sockets, self.record
        with self.phase("ssh"):
            endpoint = ssh.write_exec_config(machine.ssh, machine.name, record.user, machine.ssh_sockets[1])
            with transport or ssh.connected(sockets.shell) as connection:
                ssh.begin_master(endpoint, connection, machine.vm_log)

    def publish(self, how: str, setup: str) -> None:
        """The guest is ready: write down how it is reached."""
        machine = self.machine
        with self.phase("network"):
            net.settle(self.watch, self.report)
            self.shares.watch()
        with self.phase("record"):
            ssh.write_config(machine.ssh, machine.name, self.record.user, machine.ssh_sockets[0])
            have = [asdict(one) for one in self.shares.listed]
            machine.update(ready=True, how=how, setup=None if setup == "-" else setup, mounts=have)

    def go(self, how: control.How, *, restored: bool) -> control.Go:
        """All that is individual to this machine."""
        machine, record = self.machine, self.record
        host_key = (machine.ssh / "host_key").read_bytes()
        return control.Go(
            how=how,
            restored=restored,
            hostname=record.name,
            user=record.user,
            image=record.image,
            grow=overlay.filesystem_mib(machine.overlay) < overlay.size_mib(machine.overlay),
            sidecars=len(self.image.sidecars),
            machine_id=record.machine_id,
            time_s=int(time.time()),
            address=f"{policy.GUEST}/{policy.PREFIX}",
            gateway=policy.GATEWAY,
            dns=policy.GATEWAY,
            host_key=host_key,
            dropbear_key=ssh.dropbear_key(host_key.decode()),
            authorized_key=(machine.ssh / "user_key.pub").read_bytes(),
            env=self.env,
            files=self.files() if how == "boot" else {},
        )

    def files(self) -> dict[str, str]:
        """What the base wants on a new disk: guest paths to contents. A template's disk holds it already."""
        from nixbox.image import apt

        settings = self.settings
        if settings.base != "debian":
            return {}
        try:
            mirrors = apt.mirrors(settings.debian_mirror, settings.debian_security_mirror)
            return {"etc/apt/sources.list.d/nixbox.sources": apt.guest_sources(mirrors, settings.suite)}
        except ConfigError:
            # An image that was built elsewhere runs on a host that knows no mirror; its apt has none then.
            self.report.note("note: no Debian mirror is known here, so apt in the guest has no package sources")
            return {}

    def explained(self, error: NixboxError) -> NixboxError:
        """A guest that ended is explained by the end of its console and of the hypervisor's own output."""
        lines = control.tail(self.machine.vm_log, 5) + control.tail(self.machine.console_log, 15)
        body = "".join(f"\n  {line}" for line in lines)
        return NixboxError(error.message + body, hint=f"the whole log: nixbox logs {self.machine.name} --console")
