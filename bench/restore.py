"""The least that a restore can take: a published template, QEMU, and one connection, with nothing around it."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from bench import bare
from nixbox.guest import ssh
from nixbox.guest.control import Control
from nixbox.machine import qemu_args, saved, template
from nixbox.machine.backend import MemoryFile
from nixbox.machine.qemu import Qemu
from nixbox.plan.model import Accelerator


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds: from QEMU's start until the guest's CPUs run, and until it has answered `ready`; then, each alone, a
    connection to dropbear over the serial port and one to OpenSSH over TCP, up to the exit of `true`.
    """

    running: float
    ready: float
    dropbear: float
    openssh: float


def published(image: Path) -> tuple[Path, template.Key]:
    """The `ready` template of an image, from what is in its directory. Raises LookupError."""
    for info in template.every():
        if info.stage == "ready" and info.image == str(image) and info.damage is None:
            path = template.directory() / info.ident
            fields = json.loads((path / template.MANIFEST).read_text())
            del fields["created_at"]
            return path, template.Key(**(fields | {"devices": tuple(fields["devices"])}))
    raise LookupError(f"no template of {image} is there")


def restore(work: Path, image: Path) -> Times:
    """Restore the template of `image` in the empty directory `work`, and connect to the guest."""
    path, key = published(image)
    with ExitStack() as undo:
        opened = template.open_files(path, key)
        undo.callback(opened.close)
        assert opened.overlay is not None and key.user is not None
        guest = bare.Bare(work, key.user)
        saved.copy(Path(f"/proc/self/fd/{opened.overlay}"), work / "overlay")
        spec = bare.spec(
            work,
            image,
            vcpus=key.vcpus,
            memory_mib=key.memory_mib,
            accelerator=cast(Accelerator, key.accelerator),
            memory=MemoryFile.of(opened.memory, shared=False),
        )
        assert tuple(qemu_args.shape(spec)) == key.devices, "the template is of another nixbox"
        undo.callback(guest.end)
        qemu = Qemu()

        begun = time.perf_counter()
        guest.start(spec, (opened.memory,))
        control = undo.enter_context(Control.connect(guest.sockets.control))
        # Before the guest goes on: its dropbear waits at the other end of this connection.
        transport = undo.enter_context(ssh.connected(guest.sockets.shell))
        qemu.load(guest.sockets, opened.state)
        qemu.resume(guest.sockets)
        running = time.perf_counter() - begun
        control.go(guest.go("hold", restored=True, image=image))
        control.expect("ready", bare.TIMEOUT_S)
        ready = time.perf_counter() - begun

        begun = time.perf_counter()
        guest.by_dropbear(transport)
        dropbear = time.perf_counter() - begun
        begun = time.perf_counter()
        guest.by_openssh()
        return Times(running, ready, dropbear, time.perf_counter() - begun)
