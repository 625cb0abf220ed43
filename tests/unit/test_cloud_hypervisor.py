"""The cloud-hypervisor backend against what stands in for cloud-hypervisor: every request fits its description."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from nixbox.errors import HostError, NixboxError
from nixbox.machine.backend import Backend, MemoryFile, Sockets, VmSpec
from nixbox.machine.cloud_hypervisor import CloudHypervisor, launcher_socket, vm_config
from nixbox.machine.cloud_hypervisor_api import Api, ApiClosed, ApiError
from nixbox.plan.network import GUEST_MAC
from tests import cloud_hypervisor as standin

ROOT = Path(standin.__file__).parent.parent
HANG_S = 20.0  # nothing here may take this long: a bound against hangs, not a measure of speed
SPEC = VmSpec(
    name="web-1",
    kernel=Path("/nix/store/image/vmlinux"),
    initrd=Path("/nix/store/image/initrd"),
    root=Path("/nix/store/root.squashfs"),
    overlay=Path("/w/overlay.img"),
    console_log=Path("/w/console.log"),
    vcpus=3,
    memory_mib=1536,
    disk_mib=8192,
    accelerator="kvm",
)
BACKEND: Backend = CloudHypervisor()


class NoNetwork:
    """The tests' own namespace, and a file in place of a TAP device, which only the real hypervisor opens."""

    def __init__(self) -> None:
        self.tap = os.open("/dev/null", os.O_RDWR)
        self.user = self.net = self.tap

    def join_for_good(self) -> None:
        return


@dataclass
class Machine:
    """A started machine: its files, and what its hypervisor was asked."""

    spec: VmSpec
    sockets: Sockets
    log: Path
    record: Path
    pid: int = 0
    pidfd: int = -1
    _fds: list[int] = field(default_factory=list)

    def start(self, pass_fds: tuple[int, ...] = ()) -> Machine:
        network = NoNetwork()
        self.pid = BACKEND.start(self.spec, self.sockets, network, self.log, pass_fds)
        os.close(network.tap)
        self.pidfd = os.pidfd_open(self.pid)
        self._fds.append(self.pidfd)
        return self

    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.record.read_text().splitlines()]

    def hypervisor(self) -> int:
        """The process of cloud-hypervisor's stand-in, as a descriptor."""
        fd = os.pidfd_open(int(self.record.with_suffix(".pid").read_text()))
        self._fds.append(fd)
        return fd

    def control(self) -> Any:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(HANG_S)
        sock.connect(str(self.sockets.control))
        return sock.makefile("rwb", buffering=0)

    def booted(self) -> Any:
        """Its control channel, after the guest's first word; the launcher serves everything by then or soon."""
        channel = self.control()
        assert channel.readline() == b"boot 2\n"
        return channel

    def end(self) -> None:
        if self.pid and not ended(self.pidfd, 0):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            assert ended(self.pidfd)
        for fd in self._fds:
            os.close(fd)


def ended(pidfd: int, timeout_s: float = HANG_S) -> bool:
    return bool(select.select([pidfd], [], [], timeout_s)[0])


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes machines whose `cloud-hypervisor`, found on PATH, is the stand-in."""
    made: list[Machine] = []
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    kernel = tmp_path / "vmlinux"
    kernel.touch()

    def make(name: str = "m", **changes: Any) -> Machine:
        home = tmp_path / name
        home.mkdir()
        program = bin_dir / "cloud-hypervisor"
        program.write_text(
            f"#!/bin/sh\ncd {ROOT} && exec {sys.executable} -m tests.cloud_hypervisor --record {home / 'record'} "
            '"$@"\n'
        )
        program.chmod(0o755)
        spec = replace(SPEC, kernel=kernel, overlay=home / "overlay", console_log=home / "console", **changes)
        made.append(Machine(spec, Sockets.in_dir(home), home / "vm.log", home / "record"))
        return made[-1]

    yield make
    for machine in made:
        machine.end()


# --- the description itself ---


def test_what_does_not_fit_the_description_is_found() -> None:
    description = standin.Description()
    good = {"payload": {"kernel": "k"}, "cpus": {"boot_vcpus": 1, "max_vcpus": 1}}
    assert description.request("PUT", "/api/v1/vm.create", good) == []
    wrong: list[tuple[str, str, Any]] = [
        ("PUT", "/api/v1/vm.make", good),
        ("GET", "/api/v1/vm.create", good),
        ("PUT", "/vm.create", good),
        ("PUT", "/api/v1/vm.create", None),
        ("PUT", "/api/v1/vm.boot", {}),
        ("PUT", "/api/v1/vm.create", {}),
        ("PUT", "/api/v1/vm.create", good | {"cpu": {}}),
        ("PUT", "/api/v1/vm.create", good | {"cpus": {"boot_vcpus": 1}}),
        ("PUT", "/api/v1/vm.create", good | {"cpus": {"boot_vcpus": True, "max_vcpus": 1}}),
        ("PUT", "/api/v1/vm.create", good | {"cpus": {"boot_vcpus": 0, "max_vcpus": 1}}),
        ("PUT", "/api/v1/vm.create", good | {"serial": {"mode": "socket"}}),
        ("PUT", "/api/v1/vm.create", good | {"disks": {"path": "a"}}),
        ("PUT", "/api/v1/vm.create", good | {"disks": [{"path": 1}]}),
    ]
    for method, path, body in wrong:
        assert len(description.request(method, path, body)) == 1, (method, path, body)


@pytest.mark.parametrize("memory", [None, MemoryFile.of(9, shared=True), MemoryFile(Path("/t/memory"), shared=False)])
@pytest.mark.parametrize("return_memory", [False, True])
def test_the_configuration_fits_the_description(memory: MemoryFile | None, return_memory: bool) -> None:
    spec = replace(SPEC, memory_file=memory, return_memory=return_memory)
    config = vm_config(spec, Path("/run/serial"))
    assert standin.Description().request("PUT", "/api/v1/vm.create", config) == []
    assert ("balloon" in config) == return_memory


def test_the_configuration_says_what_the_machine_is() -> None:
    config = vm_config(replace(SPEC, memory_file=MemoryFile.of(9, shared=True)), Path("/run/serial"))
    assert config == {
        "cpus": {"boot_vcpus": 3, "max_vcpus": 3},
        "memory": {
            "size": 0,
            "zones": [
                {"id": "mem", "size": 1536 << 20, "file": "/proc/self/fd/9", "shared": True, "mergeable": False}
            ],
        },
        "payload": {
            "kernel": "/nix/store/image/vmlinux",
            "initramfs": "/nix/store/image/initrd",
            "cmdline": "console=hvc0 quiet panic=-1 8250.nr_uarts=1 no_timer_check cryptomgr.notests "
            "random.trust_cpu=on nixbox.control=/dev/ttyS0 nixbox.shell=net",
        },
        "disks": [
            {"id": "root", "serial": "root", "path": str(SPEC.root), "readonly": True, "image_type": "Raw"},
            {"id": "overlay", "serial": "overlay", "path": str(SPEC.overlay), "readonly": False, "image_type": "Raw"},
        ],
        "rng": {"src": "/dev/urandom"},
        "serial": {"mode": "Socket", "socket": "/run/serial"},
        "console": {"mode": "File", "file": "/w/console.log"},
    }


def test_the_shape_is_without_what_is_one_machines_own() -> None:
    other = replace(SPEC, name="b", overlay=Path("/o"), console_log=Path("/c"), incoming=True)
    assert BACKEND.shape(SPEC) == BACKEND.shape(replace(other, memory_file=MemoryFile.of(3, shared=False)))
    for change in ({"vcpus": 4}, {"memory_mib": 512}, {"kernel": Path("/k")}, {"return_memory": True}):
        assert BACKEND.shape(replace(SPEC, **change)) != BACKEND.shape(SPEC)


# --- a machine's life ---


def test_a_machine_lives_and_ends(machines: Any, tmp_path: Path) -> None:
    machine = machines()
    (machine.sockets.control.with_name("serial")).write_text("left over")
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    machine.start((lock,))
    os.close(lock)
    for path in (
        *(getattr(machine.sockets, name) for name in machine.sockets.__slots__),
        launcher_socket(machine.sockets),
    ):
        assert path.stat().st_mode & 0o777 == 0o600
    with machine.booted() as channel:
        channel.write(b"ping\n")
        assert channel.readline() == b"pong\n"
    with machine.control() as again:  # hosts come and go
        again.write(b"ping\n")
        assert again.readline() == b"pong\n"
    assert BACKEND.status(machine.sockets) == "running"
    assert BACKEND.queues(machine.sockets, "none") == ()
    BACKEND.pause(machine.sockets)
    assert BACKEND.status(machine.sockets) == "paused"
    with pytest.raises(ApiError, match="Invalid VM state transition: Paused to Paused"):
        BACKEND.pause(machine.sockets)
    BACKEND.resume(machine.sockets)
    with (tmp_path / "lock").open() as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        BACKEND.quit(machine.sockets)
        assert ended(machine.pidfd)
        fcntl.flock(other, fcntl.LOCK_EX)  # both of its processes are gone, or this would wait
    BACKEND.quit(machine.sockets)  # it has ended: nothing to do
    with pytest.raises(ApiClosed):
        BACKEND.status(machine.sockets)
    asked = machine.requests()
    assert [one["what"] for one in asked][:3] == ["vm.create", "vm.add-net", "vm.boot"]
    assert [one["fds"] for one in asked][:3] == [[], ["/dev/null"], []]
    assert asked[0]["body"] == vm_config(machine.spec, machine.sockets.control.with_name("serial"))
    assert all(one["faults"] == [] for one in asked)


def test_a_saved_machine_goes_on_as_another(machines: Any, tmp_path: Path) -> None:
    (tmp_path / "ram").touch()
    memory = MemoryFile(tmp_path / "ram", shared=True)
    first = machines("a", memory_file=memory).start()
    first.booted().close()
    with pytest.raises(ApiError, match="not paused"):
        BACKEND.save(first.sockets, memory)
    BACKEND.pause(first.sockets)
    state = BACKEND.save(first.sockets, memory)
    BACKEND.quit(first.sockets)
    second = machines("b", memory_file=MemoryFile(tmp_path / "copy", shared=False), incoming=True).start()
    with pytest.raises(ApiError, match="not created"):
        BACKEND.status(second.sockets)
    BACKEND.load(second.sockets, state)
    assert BACKEND.status(second.sockets) == "paused"
    BACKEND.resume(second.sockets)
    second.booted().close()
    restored = [one for one in second.requests() if one["what"] == "vm.restore"]
    assert [one["fds"] for one in restored] == [["/dev/null"]]
    assert restored[0]["body"]["net_fds"] == [{"id": "net", "num_fds": 1}]
    assert BACKEND.status(second.sockets) == "running"
    # Its own files, in place of those of the machine that was saved.
    own = vm_config(second.spec, second.sockets.control.with_name("serial"))
    info = Api(second.sockets.monitor).get("vm.info")["config"]
    assert {name: info[name] for name in own} == own
    assert info["net"] == [{"id": "net", "mac": GUEST_MAC}]
    assert not [path for path in second.log.parent.iterdir() if path.name.startswith(("load", "save"))]


def test_what_is_no_saved_machine_is_refused(machines: Any) -> None:
    machine = machines(incoming=True).start()
    with pytest.raises(NixboxError, match="cannot be unpacked"):
        BACKEND.load(machine.sockets, b"nothing like it")
    with pytest.raises(NixboxError, match=r"config\.json"):
        BACKEND.load(machine.sockets, b"\0" * 10240)  # an archive of nothing
    with pytest.raises(NixboxError) as caught:
        BACKEND.move(machine.sockets, machine.sockets)
    assert caught.value.hint


# --- directories of the host ---


def test_a_directory_comes_and_goes(machines: Any, tmp_path: Path) -> None:
    (tmp_path / "ram").touch()
    machine = machines(memory_file=MemoryFile(tmp_path / "ram", shared=True)).start()
    machine.booted().close()
    for tag in ("nixbox-1", "nixbox-2"):
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.settimeout(HANG_S)
            with ours:
                ours.settimeout(1)  # what is passed on may be non-blocking
                # The process behind a directory answers as soon as it is asked; what is sent early waits.
                theirs.sendall(struct.pack("=IIIQ", 1, 5, 8, 1 << 30))
                BACKEND.attach(machine.sockets, tag, ours.fileno())
            assert theirs.recv(100) == struct.pack("=III", 1, 1, 0)
            assert BACKEND.detach(machine.sockets, tag)
            assert theirs.recv(100) == b""
        assert not BACKEND.detach(machine.sockets, tag)
    asked = [one for one in machine.requests() if one["what"] == "vm.add-fs"]
    assert [one["body"]["tag"] for one in asked] == ["nixbox-1", "nixbox-2"]
    assert not [path for path in machine.log.parent.iterdir() if path.name.startswith("fs")]


def test_a_directory_needs_shared_memory(machines: Any) -> None:
    machine = machines().start()
    machine.booted().close()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(NixboxError, match=r"refused `vm\.add-fs`.*requires using shared memory"):
            BACKEND.attach(machine.sockets, "nixbox-1", ours.fileno())
        ours.close()
        theirs.settimeout(HANG_S)
        assert theirs.recv(1) == b""  # its process need not wait for anybody
    assert BACKEND.status(machine.sockets) == "running"


# --- the end, in every order ---


def test_without_its_launcher_the_hypervisor_ends(machines: Any) -> None:
    machine = machines().start()
    machine.booted().close()
    hypervisor = machine.hypervisor()
    signal.pidfd_send_signal(machine.pidfd, signal.SIGKILL)
    assert ended(hypervisor)


def test_without_its_hypervisor_the_launcher_ends(machines: Any) -> None:
    machine = machines().start()
    with machine.booted() as channel:
        channel.write(b"die\n")
        assert channel.readline() == b""
    assert ended(machine.pidfd)
    assert os.waitstatus_to_exitcode(os.waitpid(machine.pid, 0)[1]) == 7


def test_a_guest_that_restarts_ends(machines: Any) -> None:
    machine = machines().start()
    with machine.booted() as channel:
        channel.write(b"reboot\n")
        assert channel.readline() == b""
    assert ended(machine.pidfd)


def test_a_vm_that_cannot_be_made_says_why(machines: Any, tmp_path: Path) -> None:
    (tmp_path / "vmlinux").unlink()
    machine = machines().start()
    with machine.control() as channel, contextlib.suppress(ConnectionResetError):
        assert channel.readline() == b""
    assert ended(machine.pidfd)
    assert "refused `vm.create`: Error from API: Cannot open kernel file" in machine.log.read_text()


def test_a_hypervisor_that_does_not_start_says_why(machines: Any, tmp_path: Path) -> None:
    machine = machines()
    (tmp_path / "bin/cloud-hypervisor").write_text("#!/bin/sh\necho 'no KVM here' >&2\nexit 3\n")
    machine.start()
    assert ended(machine.pidfd)
    assert "no KVM here\n" in machine.log.read_text()
    assert "the machine could not be started: cloud-hypervisor" in machine.log.read_text()


def test_a_bound_machine_ends_with_who_started_it(machines: Any) -> None:
    machine = machines(bound=True)
    script = (
        "import sys; sys.path.insert(0, 'tests/unit'); from test_cloud_hypervisor import *\n"
        f"m = Machine({machine.spec!r}, {machine.sockets!r}, {machine.log!r}, {machine.record!r})\n"
        "m.start(); m.booted(); print(m.pid, flush=True); sys.stdin.read()"
    ).replace("PosixPath", "Path")
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        launcher, hypervisor = os.pidfd_open(pid), machine.hypervisor()
        starter.kill()
    assert ended(launcher) and ended(hypervisor)
    os.close(launcher)


# --- the host ---


def test_only_kvm_will_do(machines: Any) -> None:
    machine = machines(accelerator="tcg")
    with pytest.raises(HostError, match="needs KVM") as caught:
        machine.start()
    assert caught.value.hint is not None and "--backend qemu" in caught.value.hint


def test_a_host_without_the_program_is_told(machines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machines()
    program = tmp_path / "bin/cloud-hypervisor"
    program.write_text("#!/bin/sh\necho cloud-hypervisor v48.0\n")
    assert BACKEND.version() == "cloud-hypervisor v48.0"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="`cloud-hypervisor` is not on this host") as caught:
        BACKEND.check_host()
    assert caught.value.hint is not None and "apt" not in caught.value.hint
    with pytest.raises(HostError, match="`cloud-hypervisor` is not on this host"):
        machine.start()
