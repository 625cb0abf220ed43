"""The least that a start can take: QEMU with nixbox's files and options, and ssh, with nothing around it.

Everything that can be is prepared beforehand (keys, disk): only the start and the first connection are timed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from nixbox.guest import ssh
from nixbox.guest.control import Control, Go, How
from nixbox.image import store
from nixbox.machine import qemu_args
from nixbox.machine.backend import MemoryFile, Sockets, VmSpec
from nixbox.plan.model import Accelerator

TIMEOUT_S = 240.0
NAME = "bare"


def spec(
    work: Path,
    image: Path,
    *,
    vcpus: int,
    memory_mib: int,
    accelerator: Accelerator,
    memory: MemoryFile | None = None,
) -> VmSpec:
    """What nixbox would start for a machine of this image with the disk `work`/overlay; with `memory`: restore."""
    return VmSpec(
        name=NAME,
        kernel=store.physical(image / "vmlinux"),
        initrd=store.physical(image / "initrd"),
        root=store.physical(image / "root.squashfs"),
        overlay=work / "overlay",
        console_log=work / "console",
        vcpus=vcpus,
        memory_mib=memory_mib,
        accelerator=accelerator,
        memory_file=memory,
        incoming=memory is not None,
    )


class Bare:
    """One QEMU of ours, its files in `work`; ended by `end`."""

    def __init__(self, work: Path, user: str) -> None:
        self.work = work
        self.user = user
        self.sockets = Sockets.in_dir(work)
        ssh.make_keys(work)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, spec: VmSpec, pass_fds: Sequence[int] = ()) -> None:
        """Start QEMU; its sockets accept at once."""
        with ExitStack() as undo:
            listeners = []
            for path in (self.sockets.control, self.sockets.monitor, self.sockets.shell):
                listener = undo.enter_context(socket.socket(socket.AF_UNIX))
                listener.bind(str(path))
                listener.listen()
                listeners.append(listener.fileno())
            argv = qemu_args.argv(spec, qemu_args.Fds(*listeners), sandbox=sys.platform == "linux")
            self.process = subprocess.Popen(argv, pass_fds=(*listeners, *pass_fds), stdin=subprocess.DEVNULL)

    def go(self, how: How, *, restored: bool, image: Path) -> Go:
        """An identity like that of any machine, but for an environment and files."""
        host_key = (self.work / "host_key").read_bytes()
        return Go(
            how=how,
            restored=restored,
            hostname=NAME,
            user=self.user,
            image=str(image),
            grow=False,
            machine_id=os.urandom(16).hex(),
            time_s=int(time.time()),
            address=qemu_args.GUEST_ADDRESS,
            gateway=qemu_args.GUEST_GATEWAY,
            dns=qemu_args.GUEST_DNS,
            host_key=host_key,
            dropbear_key=ssh.dropbear_key(host_key.decode()),
            authorized_key=(self.work / "user_key.pub").read_bytes(),
            env={},
            files={},
        )

    def by_dropbear(self, transport: socket.socket) -> None:
        """`ssh … true` over the connected socket of the guest's serial port, with nixbox's own settings."""
        endpoint = ssh.write_exec_config(self.work, NAME, self.user, self.work / "none")
        self._true(endpoint, "-o", "ProxyCommand=-", stdio=transport.fileno())

    def by_openssh(self, port: int) -> None:
        """`ssh … true` as another program would call it, with the settings of `nixbox ssh-config`."""
        self._true(ssh.write_config(self.work, NAME, self.user, port, self.work / "none"))

    def _true(self, endpoint: ssh.Endpoint, *options: str, stdio: int = subprocess.DEVNULL) -> None:
        """A connection of its own. `-n`: the command must not read standard input, which may be that connection."""
        argv = endpoint.argv("-n", "-o", "ControlMaster=no", "-o", "ControlPath=none", *options)
        subprocess.run([*argv, "true"], stdin=stdio, stdout=stdio, check=True)

    def end(self) -> None:
        """End QEMU, if it was started."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class ColdGuest:
    """A cold boot to the first command, with a disk that is ready."""

    def __init__(self, work: Path, image: Path, *, vcpus: int, memory_mib: int, accelerator: Accelerator) -> None:
        self.bare = Bare(work, "dev")
        self.image = image
        self.spec = spec(work, image, vcpus=vcpus, memory_mib=memory_mib, accelerator=accelerator)
        with self.spec.overlay.open("wb") as disk:
            disk.truncate(2 << 30)
        subprocess.run(["/sbin/mke2fs", "-q", "-t", "ext4", "-F", str(self.spec.overlay)], check=True)

    def first_command(self) -> None:
        """Boot, give the guest its keys, and run `true` over SSH."""
        bare = self.bare
        bare.start(self.spec)
        with Control.connect(bare.sockets.control) as control:
            control.expect("boot", TIMEOUT_S)
            control.go(bare.go("boot", restored=False, image=self.image))
            control.expect("ready", TIMEOUT_S)
            with ssh.connected(bare.sockets.shell) as transport:
                bare.by_dropbear(transport)
