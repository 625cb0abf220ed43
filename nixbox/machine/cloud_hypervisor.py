"""The cloud-hypervisor backend: a launcher process for each machine, and a REST API (`cloud_hypervisor_api`).

cloud-hypervisor has no port for the guest's control channel to which hosts may come and go, and none for SSH; it
takes no connected socket for a shared directory. A small process of ours that starts it does all three
(`cloud_hypervisor_child`), and is the process that lives as long as the machine.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nixbox import linux, run
from nixbox.errors import HostError, NixboxError, TimeoutExpired
from nixbox.machine import qemu_args
from nixbox.machine.backend import (
    Features,
    MemoryFile,
    Network,
    Sockets,
    VmSpec,
    architecture,
    check_tools,
    disks,
    listening,
)
from nixbox.machine.cloud_hypervisor_api import Api, ApiClosed
from nixbox.plan.model import Queue
from nixbox.plan.network import GUEST_ADDRESS, GUEST_SHELL_PORT
from nixbox.programs import Programs
from nixbox.values import replace

PROGRAM = "cloud-hypervisor"
_SAVE_TIMEOUT_S = 600.0  # a large guest on a slow disk
_LAUNCHER_TIMEOUT_S = 30.0  # it waits itself for cloud-hypervisor, and for a guest that lets go of a directory
_MEMORY = "mem"
# QEMU's words (qapi/run-state.json) for VmState (vmm/src/vm.rs): one vocabulary for all backends.
_STATES = {
    "Created": "prelaunch",
    "Running": "running",
    "Shutdown": "shutdown",
    "Paused": "paused",
    "BreakPoint": "debug",
}
# The first serial port is the control channel, so the console is virtio's.
_KERNEL_ARGS = (
    "console=hvc0",
    *(word for word in qemu_args.KERNEL_ARGS if not word.startswith("console=")),
    "nixbox.control=/dev/ttyS0",
    "nixbox.shell=net",
)


def launcher_socket(sockets: Sockets) -> Path:
    """Where a machine's launcher listens."""
    return sockets.monitor.with_name("launch")


def _program() -> str:
    found = run.find_tool(PROGRAM)
    if found is None:
        raise HostError(
            f"the program `{PROGRAM}` is not on this host",
            hint="Debian has no package of it: put a release of github.com/cloud-hypervisor/cloud-hypervisor, or "
            "nixpkgs', on PATH; or use --backend qemu",
        )
    return found


def _memory(spec: VmSpec) -> dict[str, Any]:
    size = spec.memory_mib << 20
    if spec.memory_file is None:
        return {"size": size, "shared": False, "mergeable": False}
    # A file can only be given for a zone, and the zones' sizes are then all there is (docs/memory.md).
    zone = {
        "id": _MEMORY,
        "size": size,
        "file": str(spec.memory_file.path),
        "shared": spec.memory_file.shared,
        "mergeable": False,  # never merged with other guests' pages by the host's KSM: a side channel
    }
    return {"size": 0, "zones": [zone]}


def _disk(name: str, path: Path, *, readonly: bool) -> dict[str, Any]:
    # Were the type not given, a raw image's first sector could not be written.
    return {"id": name, "serial": name, "path": str(path), "readonly": readonly, "image_type": "Raw"}


def vm_config(spec: VmSpec, serial: Path) -> dict[str, Any]:
    """The VmConfig of a machine, without its network card, whose descriptor only `vm.add-net` takes.

    `serial` is the unix socket that cloud-hypervisor is to make for the first serial port.
    """
    config: dict[str, Any] = {
        "cpus": {"boot_vcpus": spec.vcpus, "max_vcpus": spec.vcpus},
        "memory": _memory(spec),
        "payload": {"kernel": str(spec.kernel), "initramfs": str(spec.initrd), "cmdline": " ".join(_KERNEL_ARGS)},
        "disks": [_disk(name, path, readonly=readonly) for name, path, readonly in disks(spec)],
        "rng": {"src": "/dev/urandom"},
        "serial": {"mode": "Socket", "socket": str(serial)},
        "console": {"mode": "File", "file": str(spec.console_log)},
    }
    if spec.return_memory:
        config["balloon"] = {"size": 0, "free_page_reporting": True}
    return config


class CloudHypervisor:
    """Backend `cloud-hypervisor`: KVM only.

    It has no device that tells a restored guest to renew its random numbers (vmgenid), so no machine is begun from
    a saved one (`features.restore`): two of them would draw the same keys. `save` and `load` do work.
    A full host disk is an error in the guest: nothing waits for space, as it does with QEMU.
    """

    name = "cloud-hypervisor"
    features = Features(templates=False, restore=False, hot_plug=True, emulates=False)
    kernel, initrd = "vmlinux", "initrd"

    def check_host(self) -> None:
        """cloud-hypervisor and what goes with a machine: its disk's and its keys' programs. Raises HostError."""
        if architecture() not in ("x86_64", "AMD64") or sys.platform != "linux":
            raise HostError(
                f"cloud-hypervisor runs machines on x86_64 Linux hosts, not on {sys.platform} {architecture()}",
                hint="--backend qemu",
            )
        _program()
        check_tools()

    def check(self, spec: VmSpec) -> None:
        """Nothing: it says itself what is wrong."""

    def expect(self, programs: Programs) -> None:
        """None: its launcher is no light process."""

    def version(self) -> str:
        """`cloud-hypervisor v…`, as the program says it."""
        return run.run([_program(), "--version"], timeout_s=20).stdout.partition("\n")[0].strip()

    def shape(self, spec: VmSpec) -> list[str]:
        """The VmConfig without what is one machine's own, one line for each of its parts."""
        nothing = replace(spec, name="", overlay=Path("overlay"), console_log=Path("console"), memory_file=None)
        config = vm_config(nothing, Path("serial"))
        return [PROGRAM, *(f"{part} {json.dumps(config[part], sort_keys=True)}" for part in sorted(config))]

    def start(
        self,
        spec: VmSpec,
        sockets: Sockets,
        network: Network,
        log: Path,
        pass_fds: Sequence[int],
        programs: Programs | None = None,
    ) -> int:
        """Start the launcher in the network namespace; it and cloud-hypervisor inherit the sockets and `pass_fds`."""
        if spec.accelerator != "kvm":
            raise HostError(
                f"cloud-hypervisor needs KVM, and this machine would run with {spec.accelerator}",
                hint="--backend qemu runs everywhere",
            )
        serial = sockets.control.with_name("serial")
        with sockets.listening() as (control, monitor, shell), listening(launcher_socket(sockets)) as launcher:
            fds = {
                "control": control.fileno(),
                "api": monitor.fileno(),
                "shell": shell.fileno(),
                "launcher": launcher.fileno(),
                "tap": network.tap,
            }
            settings = {
                "program": _program(),
                "vm": vm_config(spec, serial),
                "incoming": spec.incoming,
                "api": str(sockets.monitor),
                "guest": (GUEST_ADDRESS, GUEST_SHELL_PORT),
                "log": str(log),
                "fds": fds,
                "pass_fds": list(pass_fds),
            }
            parent = os.getpid()

            def inside() -> None:
                network.join_for_good()
                if spec.bound:
                    linux.end_with_parent(parent)

            argv = run.own_program("nixbox.machine.cloud_hypervisor_child", f"nixbox-{spec.name}")
            inherited = (*fds.values(), *pass_fds)
            process = run.spawn(argv, log=log, pass_fds=inherited, inside=inside, talk=True)
        assert process.stdin is not None and process.stdout is not None
        process.stdout.close()  # what it has to say goes to the log
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # it says why on its way out
            pipe.write(json.dumps(settings).encode())
        return process.pid

    def pause(self, sockets: Sockets) -> None:
        """`vm.pause`: the disks' queues stand still too, and what was written is in the host's page cache."""
        Api(sockets.monitor).put("vm.pause")

    def save(self, sockets: Sockets, memory: MemoryFile) -> bytes:
        """`vm.snapshot` as an archive of its files: memory that is in a shared file with a name is not among them.

        cloud-hypervisor decides that by itself (MemoryManager::memory_range_table).
        """
        with tempfile.TemporaryDirectory(prefix="save", dir=sockets.monitor.parent) as directory:
            api = Api(sockets.monitor)
            api.put("vm.snapshot", {"destination_url": f"file://{directory}"}, timeout_s=_SAVE_TIMEOUT_S)
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w") as archive:
                for file in sorted(Path(directory).iterdir()):
                    archive.add(file, arcname=file.name)
        return packed.getvalue()

    def load(self, sockets: Sockets, state: bytes) -> None:
        """`vm.restore`, by the launcher: it has the network card, and the paths that replace the saved ones.

        The VM's process needs the directory only until it has answered: memory is copied out of it.
        """
        with tempfile.TemporaryDirectory(prefix="load", dir=sockets.monitor.parent) as directory:
            try:
                _unpack(state, Path(directory))
            except (tarfile.TarError, OSError) as error:
                raise NixboxError(f"the saved machine cannot be unpacked: {error}") from None
            _ask(sockets, "restore", directory=directory, timeout_s=_SAVE_TIMEOUT_S)

    def move(self, source: Sockets, target: Sockets) -> None:
        """Not possible: a migration of cloud-hypervisor's gives the new process no network card."""
        raise NixboxError(
            "cloud-hypervisor cannot copy a running machine into another",
            hint="--backend qemu can; or `nixbox down`, and fork the stopped machine",
        )

    def status(self, sockets: Sockets) -> str:
        """`vm.info`'s state, in QEMU's words."""
        state = str(Api(sockets.monitor).get("vm.info")["state"])
        return _STATES.get(state, state.lower())

    def resume(self, sockets: Sockets) -> None:
        """`vm.resume`."""
        Api(sockets.monitor).put("vm.resume")

    def attach(self, sockets: Sockets, tag: str, connection: int) -> None:
        """`vm.add-fs`, by the launcher, which stands between the connection and the path that the API wants."""
        _ask(sockets, "attach", (connection,), tag=tag)

    def queues(self, sockets: Sockets, tag: str) -> tuple[Queue, ...]:
        """Not told by the API: nobody answers for a directory whose process has ended."""
        return ()

    def detach(self, sockets: Sockets, tag: str) -> bool:
        """`vm.remove-device`, which asks the guest; the launcher sees whether the device went."""
        return bool(_ask(sockets, "detach", tag=tag)["gone"])

    def quit(self, sockets: Sockets) -> None:
        """`vmm.shutdown`; one that closes the socket before it answers has done so too."""
        with contextlib.suppress(ApiClosed):
            Api(sockets.monitor).put("vmm.shutdown")


def _unpack(state: bytes, directory: Path) -> None:
    """The files of what `save` returned; nothing lands outside. Raises tarfile.TarError, OSError."""
    with tarfile.open(fileobj=io.BytesIO(state)) as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is not None:
                with (directory / Path(member.name).name).open("wb") as file:
                    shutil.copyfileobj(content, file)


def _ask(
    sockets: Sockets, what: str, fds: Sequence[int] = (), *, timeout_s: float = _LAUNCHER_TIMEOUT_S, **more: str
) -> dict[str, Any]:
    """Let a machine's launcher do something: a short request, and its answer. Raises NixboxError."""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(timeout_s)
            sock.connect(str(launcher_socket(sockets)))
            socket.send_fds(sock, [json.dumps({"do": what, **more}).encode()], list(fds))
            data = b""
            while part := sock.recv(1 << 16):
                data += part
    except TimeoutError:
        raise TimeoutExpired(f"the machine's launcher did not {what} within {timeout_s:g} s") from None
    except OSError as error:
        raise ApiClosed(f"the machine's launcher does not answer: {error.strerror or error}") from None
    if not data:
        raise ApiClosed(f"the machine ended before it could {what}", hint="`nixbox logs` shows its last words")
    answer: dict[str, Any] = json.loads(data)
    if "error" in answer:
        raise NixboxError(answer["error"])
    return answer
