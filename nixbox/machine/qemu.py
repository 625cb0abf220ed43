"""The QEMU backend: one child process per machine, spoken to by QMP."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nixbox import linux, paths, run
from nixbox.errors import HostError, NixboxError
from nixbox.machine import qemu_args
from nixbox.machine.backend import Features, MemoryFile, Network, Sockets, VmSpec, architecture, check_tools
from nixbox.machine.qmp import Qmp, QmpClosed, QmpCommandError, QmpTimeout
from nixbox.plan.model import Queue
from nixbox.programs import Programs

_PROGRAM = "qemu-system-x86_64"
_QMP_TIMEOUT_S = 10.0
_UNPLUG_TIMEOUT_S = 5.0
_QUEUE = 512  # requests that may wait at a time
_SAVE_TIMEOUT_S = 600.0  # a large guest on a slow disk


class Qemu:
    """Backend `qemu`: runs anywhere QEMU does, with KVM, Apple's hypervisor or software emulation."""

    name = "qemu"
    features = Features(templates=True, restore=True, hot_plug=True, emulates=True)
    kernel, initrd = "vmlinux", "initrd"

    def check_host(self) -> None:
        """QEMU and what goes with a machine: its disk's and its keys' programs. Raises HostError."""
        if architecture() not in ("x86_64", "AMD64"):
            raise HostError(
                f"this version runs machines on x86_64 hosts only, not on {architecture()}",
                hint="images for aarch64 can be locked and built already",
            )
        check_tools(_PROGRAM)

    def check(self, spec: VmSpec) -> None:
        """Nothing: QEMU says itself what is wrong."""

    def expect(self, programs: Programs) -> None:
        """None: QEMU is a program of its own."""

    def version(self) -> str:
        """`QEMU emulator version …`, as the program says it; asked once for each program file."""
        program = Path(run.tool(_PROGRAM)).resolve()
        info = program.stat()
        ident = f"{program} {info.st_dev}:{info.st_ino} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}"
        kept = paths.cache_dir() / "qemu-version"
        try:
            known, _, text = kept.read_text().partition("\n")
            if known == ident and text:
                return text
        except OSError:
            pass
        text = run.run([str(program), "--version"], timeout_s=20).stdout.partition("\n")[0].strip()
        with contextlib.suppress(OSError, NixboxError):  # a cache that cannot be written is none
            kept.parent.mkdir(parents=True, exist_ok=True)
            paths.write_atomic(kept, f"{ident}\n{text}")
        return text

    def shape(self, spec: VmSpec) -> list[str]:
        """QEMU's command line without what is one machine's own."""
        return qemu_args.shape(spec)

    def start(
        self,
        spec: VmSpec,
        sockets: Sockets,
        network: Network,
        log: Path,
        pass_fds: Sequence[int],
        programs: Programs | None = None,
    ) -> int:
        """Start QEMU in its network namespace with the listening sockets and `pass_fds` as inherited descriptors."""
        with sockets.listening() as (control, monitor, shell):
            fds = qemu_args.Fds(control.fileno(), monitor.fileno(), shell.fileno(), network.tap)
            argv = qemu_args.argv(spec, fds, sandbox=sys.platform == "linux")
            inherited = (fds.control, fds.monitor, fds.shell, fds.tap, *pass_fds)
            parent = os.getpid()

            def inside() -> None:
                linux.make_room()
                network.join_for_good()
                if spec.bound and sys.platform == "linux":
                    linux.end_with_parent(parent)

            return run.spawn(argv, log=log, pass_fds=inherited, inside=inside).pid

    def pause(self, sockets: Sockets) -> None:
        """`stop`: also drains the disks and flushes them."""
        with self._monitor(sockets) as qmp:
            qmp.execute("stop")

    def save(self, sockets: Sockets, memory: MemoryFile) -> bytes:
        """`migrate` into a pipe: some 200 kB, since the memory is in its file already (x-ignore-shared)."""
        with self._monitor(sockets) as qmp:
            reading = _through_pipe(qmp, "migrate")
            with os.fdopen(reading, "rb") as pipe:
                state = pipe.read()  # QEMU closes its end when it is done, or has failed, or is gone
            _finished(qmp)
        return state

    def load(self, sockets: Sockets, state: bytes) -> None:
        """`migrate-incoming` from a pipe."""
        with self._monitor(sockets) as qmp:
            writing = _through_pipe(qmp, "migrate-incoming")
            with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "wb") as pipe:
                pipe.write(state)
            _finished(qmp)

    def move(self, source: Sockets, target: Sockets) -> None:
        """`migrate` of one QEMU into another, through a pipe between them.

        The guest has to stand still: QEMU 7.2 loses writes of one that runs under software emulation meanwhile. Its
        vCPUs go on without marking pages dirty; mended upstream in 9.0 ("physmem: Fix migration dirty bitmap
        coherency with TCG memory access").
        """
        with self._monitor(source) as giver, self._monitor(target) as taker:
            reading, writing = os.pipe()
            try:
                _migrate(taker, "migrate-incoming", reading, memory_is_file=False)
                _migrate(giver, "migrate", writing, memory_is_file=False)
            finally:
                os.close(reading)
                os.close(writing)
            _finished(giver)
            _finished(taker)

    def status(self, sockets: Sockets) -> str:
        """QEMU's RunState (qapi/run-state.json)."""
        with self._monitor(sockets) as qmp:
            return str(qmp.execute("query-status")["status"])

    def resume(self, sockets: Sockets) -> None:
        """`cont`: a write that failed for lack of space is tried again."""
        with self._monitor(sockets) as qmp:
            qmp.execute("cont")

    def attach(self, sockets: Sockets, tag: str, connection: int) -> None:
        """`chardev-add` and `device_add` of vhost-user-fs-pci (docs/system/devices/vhost-user.rst)."""
        with self._monitor(sockets) as qmp:
            qmp.execute("getfd", {"fdname": tag}, fds=[connection])
            address = {"type": "fd", "data": {"str": tag}}
            backend = {"type": "socket", "data": {"addr": address, "server": False}}
            qmp.execute("chardev-add", {"id": f"c-{tag}", "backend": backend})
            device = {"driver": "vhost-user-fs-pci", "id": tag, "chardev": f"c-{tag}", "tag": tag}
            bus = {"bus": qemu_args.MOUNTS_BUS, "queue-size": _QUEUE}
            try:
                qmp.execute("device_add", device | bus)
            except QmpCommandError:
                qmp.execute("chardev-remove", {"id": f"c-{tag}"})
                raise

    def queues(self, sockets: Sockets, tag: str) -> tuple[Queue, ...]:
        """`x-query-virtio-vhost-queue-status` (QEMU 7.2). The one without `vhost` would stop the queue."""
        found = []
        with self._monitor(sockets) as qmp, contextlib.suppress(QmpCommandError):
            for number in range(2):  # that for urgent messages, and that for requests
                path = f"/machine/peripheral/{tag}/virtio-backend"
                said = qmp.execute("x-query-virtio-vhost-queue-status", {"path": path, "queue": number})
                found.append(Queue(said["desc-phys"], said["avail-phys"], said["used-phys"], said["num"]))
        return tuple(queue for queue in found if queue.descriptors)

    def detach(self, sockets: Sockets, tag: str) -> bool:
        """`device_del`, which asks the guest, and `chardev-remove`."""
        with self._monitor(sockets) as qmp:
            try:
                qmp.execute("device_del", {"id": tag})
                qmp.wait_event(
                    "DEVICE_DELETED", timeout_s=_UNPLUG_TIMEOUT_S, where=lambda event: event.data.get("device") == tag
                )
                qmp.execute("chardev-remove", {"id": f"c-{tag}"})
            except (QmpCommandError, QmpTimeout):
                return False
        return True

    def quit(self, sockets: Sockets) -> None:
        """`quit`; a QEMU that closes the socket before it answers has done so too."""
        try:
            with self._monitor(sockets) as qmp:
                qmp.execute("quit")
        except QmpClosed:
            return

    def _monitor(self, sockets: Sockets) -> Qmp:
        return Qmp.connect(sockets.monitor, _QMP_TIMEOUT_S)


def _migrate(qmp: Qmp, command: str, fd: int, *, memory_is_file: bool) -> None:
    """Begin a migration over a descriptor: a sandboxed QEMU can start no program to pump the bytes for it."""
    capabilities = {"x-ignore-shared": memory_is_file, "events": True}
    listed = [{"capability": name, "state": state} for name, state in capabilities.items()]
    qmp.execute("migrate-set-capabilities", {"capabilities": listed})
    # The default bound is meant for a network: 128 MiB/s.
    qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
    qmp.execute("getfd", {"fdname": "state"}, fds=[fd])
    qmp.execute(command, {"uri": "fd:state"})


def _through_pipe(qmp: Qmp, command: str) -> int:
    """Begin a migration over a pipe; returns our end of it."""
    reading, writing = os.pipe()
    ours, theirs = (reading, writing) if command == "migrate" else (writing, reading)
    try:
        _migrate(qmp, command, theirs, memory_is_file=True)
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    return ours


def _finished(qmp: Qmp, timeout_s: float = _SAVE_TIMEOUT_S) -> None:
    """Wait for the end of a migration. Raises NixboxError when it failed."""
    done = qmp.wait_event(
        "MIGRATION",
        timeout_s=timeout_s,
        where=lambda event: event.data.get("status") in ("completed", "failed"),
    )
    if done.data["status"] == "failed":
        why = qmp.execute("query-migrate").get("error-desc", "it does not say why")
        raise NixboxError(f"QEMU could not save or restore the machine: {why}")
