"""The least that a cold boot can take: QEMU with the same files and options, and ssh, with nothing around it."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

from nixbox.guest.control import Go
from nixbox.image import store
from nixbox.machine import qemu_args
from nixbox.machine.backend import VmSpec


class BareGuest:
    """Prepared beforehand (keys, disk): only the boot and the first connection are timed."""

    def __init__(self, work: Path, image: Path) -> None:
        self.work = work
        self.spec = VmSpec(
            name="bare",
            kernel=store.physical(image / "vmlinux"),
            initrd=store.physical(image / "initrd"),
            root=store.physical(image / "root.squashfs"),
            overlay=work / "overlay",
            console_log=work / "console",
            vcpus=2,
            memory_mib=512,
            accelerator="tcg",
        )
        with (work / "overlay").open("wb") as disk:
            disk.truncate(2 << 30)
        subprocess.run(["/sbin/mke2fs", "-q", "-t", "ext4", "-F", str(work / "overlay")], check=True)
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(work / name)], check=True)
        key = (work / "host.pub").read_text()
        (work / "known").write_text(f"bare {key}")
        self.process: subprocess.Popen[bytes] | None = None

    def first_command(self) -> None:
        """Boot, give the guest its keys, and run `true` over SSH."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        control = socket.socket(socket.AF_UNIX)
        control.bind(str(self.work / "ctl"))
        control.listen()
        monitor = socket.socket(socket.AF_UNIX)
        monitor.bind(str(self.work / "qmp"))
        monitor.listen()
        argv = qemu_args.argv(self.spec, qemu_args.Fds(control.fileno(), monitor.fileno()), sandbox=True)
        argv = [word.replace("127.0.0.1:0-:22", f"127.0.0.1:{port}-:22") for word in argv]
        fds = (control.fileno(), monitor.fileno())
        self.process = subprocess.Popen(argv, pass_fds=fds, stdin=subprocess.DEVNULL)
        control.close()
        monitor.close()
        channel = socket.socket(socket.AF_UNIX)
        channel.connect(str(self.work / "ctl"))
        lines = channel.makefile("rb")
        assert lines.readline().startswith(b"boot")
        payload = self._go().pack()
        channel.sendall(b"go %d\n" % len(payload) + payload)
        assert lines.readline().startswith(b"ready")
        options = ["-F", "none", "-i", str(self.work / "user"), "-p", str(port), "-o", "HostKeyAlias=bare"]
        options += ["-o", f"UserKnownHostsFile={self.work / 'known'}", "-o", "LogLevel=ERROR"]
        subprocess.run(["ssh", *options, "dev@127.0.0.1", "true"], check=True, stdin=subprocess.DEVNULL)

    def _go(self) -> Go:
        return Go(
            hostname="bare",
            user="dev",
            image="bare",
            grow=False,
            machine_id=os.urandom(16).hex(),
            time_s=int(time.time()),
            address=qemu_args.GUEST_ADDRESS,
            gateway=qemu_args.GUEST_GATEWAY,
            dns=qemu_args.GUEST_DNS,
            host_key=(self.work / "host").read_bytes(),
            authorized_key=(self.work / "user.pub").read_bytes(),
            env={},
            files={},
        )

    def end(self) -> None:
        """End the QEMU that first_command started."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
