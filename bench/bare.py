"""The least that a start can take: QEMU with nixbox's files and options, and ssh, with nothing around it.

Everything that can be is prepared beforehand (keys, disk): only the start and the first connection are timed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from nixbox.guest import ssh
from nixbox.guest.control import Control, Go, How
from nixbox.image import store
from nixbox.machine import qemu_args
from nixbox.machine.backend import MemoryFile, Sockets, VmSpec
from nixbox.network import inside, namespace, policy
from nixbox.plan.model import Accelerator

TIMEOUT_S = 240.0
NAME = "bare"
DISK_MIB = 2048


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
        root=store.physical(image / "root.img"),
        overlay=work / "overlay",
        console_log=work / "console",
        vcpus=vcpus,
        memory_mib=memory_mib,
        disk_mib=DISK_MIB,
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
        self.network: namespace.Namespace | None = None

    def start(
        self, spec: VmSpec, pass_fds: Sequence[int] = (), user_network: Callable[[], None] | None = None
    ) -> None:
        """Start QEMU; its sockets accept at once.

        With `user_network` it is not in a namespace of its own and has QEMU's user network; that is called in its
        process first.
        """
        with ExitStack() as undo:
            listeners = []
            for path in (self.sockets.control, self.sockets.monitor, self.sockets.shell):
                listener = undo.enter_context(socket.socket(socket.AF_UNIX))
                listener.bind(str(path))
                listener.listen()
                listeners.append(listener.fileno())
            self.network = namespace.create()
            fds = qemu_args.Fds(listeners[0], listeners[1], listeners[2], self.network.tap)
            argv = qemu_args.argv(spec, fds, sandbox=sys.platform == "linux")
            if user_network is not None:
                argv[argv.index("-netdev") + 1] = "user,id=net,ipv6=off"
            self.process = subprocess.Popen(
                argv,
                pass_fds=(*listeners, self.network.tap, *pass_fds),
                stdin=subprocess.DEVNULL,
                preexec_fn=user_network or self.network.join_for_good,
            )

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
            sidecars=0,
            machine_id=os.urandom(16).hex(),
            time_s=int(time.time()),
            address=f"{policy.GUEST}/{policy.PREFIX}",
            gateway=policy.GATEWAY,
            dns=policy.GATEWAY,
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

    def by_openssh(self) -> None:
        """`ssh … true` at OpenSSH in the guest, over TCP and the guest's network card, with nixbox's own settings."""
        endpoint = ssh.write_exec_config(self.work, NAME, self.user, self.work / "none")
        with self._tcp(22) as connection:
            self._true(endpoint, "-o", "ProxyCommand=-", stdio=connection.fileno())

    def _tcp(self, port: int) -> socket.socket:
        """A connection to a port of the guest, made in its namespace, where nothing filters."""
        assert self.network is not None
        ours, theirs = socket.socketpair()
        with ours, theirs:
            child = os.fork()
            if child == 0:
                try:
                    namespace.join(self.network.user, self.network.net)
                    inside.set_up_device()
                    with socket.create_connection((policy.GUEST, port), TIMEOUT_S) as made:
                        made.settimeout(None)
                        socket.send_fds(theirs, [b"x"], [made.fileno()])
                finally:
                    os._exit(0)
            theirs.close()
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
            os.waitpid(child, 0)
        return socket.socket(fileno=fds[0])

    def _true(self, endpoint: ssh.Endpoint, *options: str, stdio: int = subprocess.DEVNULL) -> None:
        """A connection of its own. `-n`: the command must not read standard input, which may be that connection."""
        argv = endpoint.argv("-n", "-o", "ControlMaster=no", "-o", "ControlPath=none", *options)
        subprocess.run([*argv, "true"], stdin=stdio, stdout=stdio, check=True)

    def end(self) -> None:
        """End QEMU, if it was started."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        if self.network is not None:
            with self.network:
                self.network = None


class ColdGuest:
    """A cold boot to the first command, with a disk that is ready."""

    def __init__(self, work: Path, image: Path, *, vcpus: int, memory_mib: int, accelerator: Accelerator) -> None:
        self.bare = Bare(work, "dev")
        self.image = image
        self.spec = spec(work, image, vcpus=vcpus, memory_mib=memory_mib, accelerator=accelerator)
        with self.spec.overlay.open("wb") as disk:
            disk.truncate(DISK_MIB << 20)
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
