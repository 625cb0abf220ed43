"""The process that becomes a libkrun machine, up to the moment at which a guest runs: its jail, and every refusal.

No guest: that needs KVM (tests/kvm). Where a library has to misbehave, a small one is compiled.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from nixbox import run
from nixbox.errors import ConfigError, HostError, NixboxError
from nixbox.jails import Inode, Share
from nixbox.machine import krun, libkrun
from nixbox.machine.backend import Backend, MemoryFile, Sockets, VmSpec
from nixbox.machine.krun import Krun
from nixbox.network import namespace
from nixbox.programs import Programs
from tests.krun import HANG_S, WAITS, build, c_library, machine_spec, needs_cc, needs_library, share

needs_devices = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is not there for this user"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(libkrun.VARIABLE, raising=False)


@pytest.fixture
def spec(tmp_path: Path) -> VmSpec:
    return machine_spec(tmp_path)


@dataclass
class Machine:
    """One machine's place; what it starts is ended with the test."""

    spec: VmSpec
    network: namespace.Namespace
    sockets: Sockets
    log: Path
    processes: list[run.Process]
    programs: Programs = field(default_factory=Programs)
    pids: list[int] = field(default_factory=list)

    def start(self, library: Path | str | None = None, pass_fds: tuple[int, ...] = ()) -> int:
        backend: Backend = Krun(None if library is None else str(library))
        pid = backend.start(self.spec, self.sockets, self.network, self.log, pass_fds, self.programs)
        self.pids.append(pid)
        return pid

    def refusal(self, library: Path | str) -> NixboxError:
        """What start() raises; no process is left."""
        with pytest.raises(NixboxError) as caught:
            self.start(library)
        assert [process.returncode is not None for process in self.processes] == [True] * len(self.processes)
        assert caught.value.hint
        return caught.value

    def end(self) -> int:
        """The exit code of what ends by itself."""
        return self.processes[-1].wait(HANG_S)


@pytest.fixture
def machine(spec: VmSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    try:
        network = namespace.create()
    except HostError as error:
        pytest.skip(f"no network for a machine: {error}")
    processes: list[run.Process] = []
    spawn = run.spawn

    def kept(*args: Any, **words: Any) -> run.Process:
        processes.append(spawn(*args, **words))
        return processes[-1]

    monkeypatch.setattr(run, "spawn", kept)
    (tmp_path / "run").mkdir()
    with network:
        started = Machine(spec, network, Sockets.in_dir(tmp_path / "run"), tmp_path / "vm.log", processes)
        yield started
        for process in processes:
            process.kill()
            process.wait()
        for pid in {*started.pids} - {process.pid for process in processes}:  # forked from another, which has ended
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def built(tmp_path: Path) -> Callable[[str], Path]:
    """Compiles a library that behaves as the text says."""
    return lambda entered: build(tmp_path, entered)


def memory_of(pid: int) -> bytes:
    """All that a process can write to."""
    found = b""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            words = line.split()
            start, _, end = words[0].partition("-")
            if words[1].startswith("rw") and int(start, 16) < 1 << 47:
                memory.seek(int(start, 16))
                with suppress(OSError):  # of a device
                    found += memory.read(int(end, 16) - int(start, 16))
    return found


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(HANG_S)
        sock.connect(str(path))
        yield sock


def assert_confined(pid: int) -> None:
    """No thread has a right over its mounts or anybody's files; those to be other users are worth nothing there."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        status = dict(line.split(":\t", 1) for line in (thread / "status").read_text().splitlines())
        assert [int(status[f"Cap{name}"], 16) for name in ("Inh", "Bnd", "Amb")] == [0] * 3
        assert status["CapPrm"] == status["CapEff"] == f"{1 << 6 | 1 << 7:016x}"  # CAP_SETUID and CAP_SETGID
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_a_library_that_is_not_libkrun_leaves_nothing_behind(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(libkrun.VARIABLE, c_library())
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(
        HostError, match=f"^{re.escape(os.path.realpath(c_library()))} lacks krun_init_log, "
    ) as caught:
        machine.start(pass_fds=(lock,))
    assert "pip install 'nixbox[krun]'" in str(caught.value.hint) and "--backend qemu" in str(caught.value.hint)
    assert machine.processes[0].returncode == 125
    assert "nixbox: libkrun refuses symbol: krun_init_log" in machine.log.read_text()
    os.close(lock)
    again = os.open(tmp_path / "lock", os.O_RDWR)
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody has it any more
    os.close(again)
    os.fstat(machine.network.tap)  # the number is still its owner's to close
    with pytest.raises(NixboxError, match="does not answer"):
        Krun().status(machine.sockets)


@needs_library
def test_a_library_that_is_damaged_is_named(machine: Machine, tmp_path: Path) -> None:
    cut = tmp_path / "cut.so"
    cut.write_bytes(libkrun.find().read_bytes()[: 1 << 16])  # to load it ends the process: SIGBUS
    error = machine.refusal(cut)
    assert "ended or did not answer" in str(error)
    assert f"{cut} may be damaged" in str(error.hint)


@needs_library
def test_a_library_for_other_machines_is_no_library(machine: Machine, tmp_path: Path) -> None:
    data = libkrun.find().read_bytes()
    other = tmp_path / "other.so"
    other.write_bytes(data[:18] + (183).to_bytes(2, "little") + data[20:])  # e_machine: EM_AARCH64
    error = machine.refusal(other)
    assert isinstance(error, HostError)
    assert str(error).startswith(f"{other} cannot be loaded: ")


@needs_cc
def test_a_library_that_hangs_is_ended(
    machine: Machine, built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(krun, "_START_LIMIT_S", 0.2)
    library = built(WAITS + "\n__attribute__((constructor)) static void hang(void) { entered(); }")
    assert "did not answer" in str(machine.refusal(library))
    assert machine.processes[0].returncode == -signal.SIGKILL


def test_a_network_that_cannot_be_joined(machine: Machine) -> None:
    network = machine.network
    with Path(os.devnull).open("rb") as no_namespace:
        machine.network = namespace.Namespace(no_namespace.fileno(), network.net, network.tap)
        assert "the machine's process cannot begin: " in str(machine.refusal(c_library()))


@needs_library
def test_a_console_log_is_no_link(machine: Machine, tmp_path: Path) -> None:
    machine.spec.console_log.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NixboxError, match=r"the machine's process cannot begin: .*Too many levels"):
        machine.start()
    assert not (tmp_path / "elsewhere").exists()


def test_files_are_looked_at_before_anything_starts(machine: Machine) -> None:
    machine.spec.overlay.write_bytes(b"odd")
    assert "no whole sectors" in str(machine.refusal(c_library()))
    assert machine.processes == []


@needs_cc
@needs_devices
def test_a_directory_that_is_another_by_now_is_not_shared(
    machine: Machine, built: Callable[[str], Path], tmp_path: Path
) -> None:
    library = built(WAITS)
    source, hidden = tmp_path / "source", tmp_path / "source/hidden"
    hidden.mkdir(parents=True)
    inode, other = Inode.of(source), Inode(0, 0)

    def why(*shares: Share) -> str:
        machine.spec = replace(machine.spec, slots=len(shares), shares=shares)
        with namespace.create() as machine.network:  # each is for one start
            error = machine.refusal(library)
        assert isinstance(error, HostError)
        return str(error).removeprefix("the machine's process cannot be jailed: ")

    assert why(Share(source, other, False, ())) == f"{source}: {source} is not what it was a moment ago"
    mask = Share(source, inode, False, ((Path("hidden"), other),))
    assert why(mask) == f"{source}: hidden is not what it was a moment ago"
    inode_of_hidden = Inode.of(hidden)
    hidden.rename(source / "moved")
    hidden.symlink_to("moved")
    mask = Share(source, inode, False, ((Path("hidden"), inode_of_hidden),))
    assert why(mask) == f"{source}: Not a directory"
    source.rename(tmp_path / "moved")
    assert why(share(tmp_path / "moved", readonly=False), mask) == f"{source}: No such file or directory"


@needs_cc
@needs_devices
def test_the_channels_of_a_machine(machine: Machine, built: Callable[[str], Path]) -> None:
    """The console, the control channel and the monitor, with a guest that says what it is told."""
    library = built(
        r"""
        static int entered(void) {
            char data[64];
            ssize_t length;
            say(terminal, "booting\n");
            while ((length = read(channel, data, sizeof data)) > 0)
                if (write(channel, data, length) < 0) break;
            return 0;
        }
        """
    )
    assert machine.start(library) == machine.processes[0].pid
    backend = Krun()
    assert backend.status(machine.sockets) == "running"
    with connected(machine.sockets.control) as sock:
        sock.sendall(b"ping\nhalf a mess")
        assert sock.recv(64) == b"ping\n"
    with connected(machine.sockets.control) as sock:
        sock.sendall(b"sync\n")
        assert sock.recv(64) == b"sync\n"
    until(lambda: b"booting" in machine.spec.console_log.read_bytes())
    assert machine.spec.console_log.stat().st_mode & 0o777 == 0o600
    with connected(machine.sockets.monitor) as sock:
        sock.sendall(b"nonsense\n")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(64) == b"?\n"
    for path in (machine.sockets.control, machine.sockets.monitor, machine.sockets.shell):
        assert path.stat().st_mode & 0o777 == 0o600
    backend.quit(machine.sockets)
    assert machine.end() == 0
    with pytest.raises(NixboxError, match="does not answer"):
        backend.status(machine.sockets)


@needs_cc
@needs_devices
@pytest.mark.parametrize("forked", [False, True])
def test_a_machine_sees_its_own_files_and_has_no_rights(
    forked: bool, machine: Machine, built: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = os.urandom(8).hex()
    monkeypatch.setenv("SECRET", secret)
    source = tmp_path / "source"
    (source / "hidden").mkdir(parents=True)
    (source / "hidden/secret").touch()
    masks = ((Path("hidden"), Inode.of(source / "hidden")),)
    shares = (Share(source, Inode.of(source), False, masks), share(source, readonly=True))
    # What ends with its starter is never forked from another.
    machine.spec = replace(machine.spec, slots=len(shares), shares=shares, bound=not forked)
    library = built(
        r"""
        #include <fcntl.h>
        #include <net/if.h>
        #include <linux/if_tun.h>
        #include <sys/ioctl.h>
        #include <sys/mount.h>
        static int entered(void) {
            say(2, umount2("/share0/hidden", MNT_DETACH) ? "kept\n" : "undone\n");
            say(2, mount("none", "/boot", 0, MS_REMOUNT | MS_BIND, 0) ? "kept\n" : "undone\n");
            struct ifreq card = {.ifr_name = "tap0", .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
            say(2, ioctl(open("/dev/net/tun", O_RDWR), TUNSETIFF, &card) ? "has no card\n" : "has a card\n");
            say(2, "tried\n");
            for (;;) pause();
        }
        """
    )
    with machine.programs.waiting("nixbox-start-web-1") if forked else nullcontext():
        if forked:
            Krun(str(library)).expect(machine.programs)
        pid = machine.start(library)
    assert (Path(f"/proc/{pid}/cmdline").read_bytes().strip(b"\0") == b"nixbox-krun-web-1") == forked
    seen = Path(f"/proc/{pid}/root")
    found = {path.name: path for path in seen.iterdir()}
    assert set(found) == {"boot", "dev", "disk0", "disk1", "kernel", "proc", "share0", "share1"}
    assert sorted(path.name for path in found["dev"].rglob("*")) == ["kvm", "net", "tun"]
    assert [path.name for path in found["proc"].iterdir()] == ["self"]
    assert (found["boot"] / "init").read_text() == "#!/bin/sh\n"
    assert [path.name for path in found["share0"].iterdir()] == ["hidden"]
    (found["share0"] / "made").touch()
    for closed in (found["share1"] / "made", found["boot"] / "init", seen / "made"):
        with pytest.raises(OSError, match="Read-only file system"):
            closed.write_text("changed")
    assert (found["share0"] / "hidden").stat().st_mode & 0o777 == 0
    until(lambda: b"tried" in machine.log.read_bytes())
    assert machine.log.read_text() == "kept\nkept\nhas a card\ntried\n"
    assert [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_dir()] == []  # each would be a way out
    assert_confined(pid)
    for kind in ("uid", "gid"):
        assert len(Path(f"/proc/{pid}/{kind}_map").read_text().splitlines()) == 1
        assert Path(f"/proc/{pid}/{kind}_map").read_text().split()[::2] == ["1000", "1"]
    assert b"SECRET" not in Path(f"/proc/{pid}/environ").read_bytes()
    assert secret.encode() in memory_of(os.getpid())
    assert secret.encode() not in memory_of(pid)
    assert Path(f"/proc/{pid}/ns/net").stat().st_ino == os.fstat(machine.network.net).st_ino


@needs_cc
@needs_devices
def test_a_restored_machine_cannot_change_its_template(
    machine: Machine, built: Callable[[str], Path], tmp_path: Path
) -> None:
    library = built(
        r"""
        #include <fcntl.h>
        #include <stdio.h>
        int32_t krun_set_snapshot_memory_fd2(uint32_t ctx, int fd, uint32_t immutable) {
            char path[64], first = 0;
            snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
            say(2, pread(fd, &first, 1, 0) == 1 && first == 'm' ? "read\n" : "not read\n");
            say(2, pwrite(fd, "x", 1, 0) == 1 ? "written\n" : "not written\n");
            say(2, open(path, O_RDWR) < 0 ? "not opened\n" : "opened\n");
            return 0;
        }
        static int entered(void) { return 0; }
        """
    )
    (tmp_path / "memory").write_bytes(b"memory")
    with (tmp_path / "memory").open("r+b") as template:  # as templates are open
        memory = MemoryFile.of(template.fileno(), shared=False)
        machine.spec = replace(machine.spec, memory_file=memory, incoming=True)
        pid = machine.start(library, (template.fileno(),))
    assert machine.log.read_text() == "read\nnot written\nnot opened\n"
    links = [fd.readlink() for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()]
    assert [link.name for link in links].count("memory") == 1
    assert Krun().status(machine.sockets) == "inmigrate"


@needs_cc
@needs_devices
@pytest.mark.parametrize("bound", [True, False])
def test_a_machine_that_is_bound_ends_with_whoever_started_it(
    machine: Machine, built: Callable[[str], Path], bound: bool
) -> None:
    machine.spec = replace(machine.spec, bound=bound)
    library = built(WAITS)
    reading, writing = os.pipe()
    starter = os.fork()
    if starter == 0:
        try:
            os.write(writing, b"%d" % machine.start(library))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        child = os.pidfd_open(int(pipe.read()))
    os.waitpid(starter, 0)
    ended = bool(select.select([child], [], [], HANG_S if bound else 0.3)[0])
    if not ended:
        signal.pidfd_send_signal(child, signal.SIGKILL)
    os.close(child)
    assert ended is bound


@needs_cc
@needs_devices
def test_a_libkrun_that_does_not_begin_says_why_in_the_log(machine: Machine, built: Callable[[str], Path]) -> None:
    machine.start(built("static int entered(void) { return -22; }"))
    assert machine.end() == 125
    assert "nixbox: libkrun refuses krun_start_enter: Invalid argument its own words\n" in machine.log.read_text()


@needs_cc
@needs_devices
def test_a_device_that_panics_ends_the_machine(machine: Machine, built: Callable[[str], Path]) -> None:
    machine.log.write_text("thread 'fs' panicked at an earlier boot\n")  # which is no reason to end
    library = built(
        r"""
        static int entered(void) {
            char data[64];
            while (read(channel, data, sizeof data) > 0) say(2, "thread 'fs' panic"), say(2, "ked at lib.rs:1\n");
            return 0;
        }
        """
    )
    machine.start(library)
    assert Krun().status(machine.sockets) == "running"
    with connected(machine.sockets.control) as sock:
        sock.sendall(b"ping\n")
        assert machine.end() == 125


@needs_cc
@needs_devices
def test_a_call_that_fails_ends_with_libkruns_own_words(machine: Machine, built: Callable[[str], Path]) -> None:
    library = built(WAITS + "\nint krun_get_max_vcpus() { return -12; }")
    error = machine.refusal(library)
    assert str(error) == "libkrun refuses krun_get_max_vcpus: its own words"
    assert machine.processes[0].returncode == 125


@needs_library
@needs_devices
def test_the_real_library_takes_every_order(machine: Machine, tmp_path: Path) -> None:
    """Up to krun_start_enter: the kernel only halts."""
    source = tmp_path / "source"
    source.mkdir()
    shares = (share(source, readonly=False), share(source, readonly=True))
    machine.spec = replace(machine.spec, slots=len(shares), shares=shares)
    pid = machine.start()  # its answer comes after the last order
    assert_confined(pid)
    machine.processes[0].kill()
    assert machine.end() == -signal.SIGKILL
    assert "refuses" not in machine.log.read_text()


@needs_library
@needs_devices
def test_the_real_library_refuses_too_many_cpus(machine: Machine) -> None:
    machine.spec = replace(machine.spec, vcpus=256)  # the most that a config may ask for
    error = machine.refusal(libkrun.find())
    assert isinstance(error, ConfigError)
    assert "resources.vcpus: 256 is more than" in str(error)
    assert re.fullmatch(r"at most vcpus = \d+", str(error.hint))
