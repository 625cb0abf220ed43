"""A KVM host that QEMU emulates, with this host's files in it: commands run there, and what they say comes back.

AMD's nested virtualization under TCG is complete enough for Debian's kvm-amd, so that what runs in the box has a
/dev/kvm that works, whatever this host has. This host's files are there, read-only (9p) below a tmpfs; `Box.work` is
shared both ways as /box.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nixbox import linux, run
from nixbox.errors import NixboxError
from nixbox.image import apt, store
from nixbox.image import lock as locks
from nixbox.machine.backend import MemoryFile, Sockets
from nixbox.machine.qemu import Qemu
from nixbox.machine.qmp import Qmp

HERE = Path(__file__).resolve().parent
MEMORY_MIB = 2048
_SUITE = "bookworm"  # Linux 6.1: 6.12 crashes in QEMU 7.2's emulation as soon as it runs a guest of its own
_START_S = 120.0
_BEAT_S = 2.0
_RUN_S = 420.0  # longer than nixbox waits for a guest that hangs (BOOT_TIMEOUT_S), which it then gets over by itself
_END_S = 10.0
_BUILD_S = 1200.0
_KERNEL_ARGS = (
    "console=ttyS0 panic=-1 quiet mitigations=off norandmaps tsc=reliable no_timer_check 8250.nr_uarts=1 "
    "random.trust_cpu=on kvm-amd.npt=1"
)


class BoxError(Exception):
    """The box does not answer, or not in time; the message ends with its console."""


@dataclass(frozen=True, slots=True)
class Done:
    """How a command in the box ended, and after how many seconds there (proc_uptime(5): to a hundredth)."""

    code: int
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Saved:
    """A box before it has anybody's files: its kernel and initrd, its memory (a file, sparse) and its devices.

    `counting`: its clock counts instructions, see Box.
    """

    kernel: Path
    initrd: Path
    memory: Path
    state: bytes
    counting: bool = False


# --- kernel and initrd ---


def lock_of(image_lock: str) -> locks.Lock:
    """An image's lock (the text of a nixbox.lock) with Debian's kernel for real machines, which has KVM.

    Raises NixboxError.
    """
    lock = locks.parse(image_lock, Path("nixbox.lock"))
    assert isinstance(lock, locks.Lock)
    with apt.open_root(_SUITE, lock.arch, apt.mirrors(None, None)) as root:
        root.update()
        kernel = root.exact([root.first_dependency(f"linux-image-{lock.arch}")])[0]
    return lock.model_copy(update={"kernel": kernel})


def build(lock: locks.Lock, directory: Path) -> tuple[Path, Path]:
    """Build kernel and initrd with Nix, rooted by a link in `directory`. Raises NixboxError."""
    file = directory / "box.lock"
    file.write_text(locks.dump(lock))
    read = f"builtins.fromJSON (builtins.readFile {file})"
    mirrors = json.dumps(json.dumps(apt.mirrors(None, None).as_dict()))
    expression = f"import {HERE / 'box.nix'} {{ lock = {read}; mirrors = builtins.fromJSON {mirrors}; }}"
    argv = ["nix", *store.setup().options, "build", "--json", "--impure", "--expr", expression]
    done = run.run([*argv, "--out-link", str(directory / "box")], timeout_s=_BUILD_S, env=store.env())
    path = Path(json.loads(done.stdout)[0]["outputs"]["out"])
    return store.physical(path / "vmlinux"), store.physical(path / "initrd")


# --- the box ---


class Box:
    """One emulated host. A context manager: it ends with the block."""

    def __init__(
        self, kernel: Path, initrd: Path, memory: Path, *, state: bytes | None, counting: bool = False
    ) -> None:
        """Boot with `memory` as the file behind its memory, or (`state`) go on from it, leaving it as it is.

        With `counting` a nanosecond of its clock is an instruction of its CPU, or one that it idles (QEMU's -icount):
        what it measures is then the same whatever else this host does, and code that is translated costs nothing.
        """
        # Not pytest's directories: a unix socket's path is short.
        self.directory = Path(tempfile.mkdtemp(prefix="nbxbox"))
        self.work = self.directory / "work"
        self.work.mkdir()
        self.console = self.directory / "console.log"
        self._sockets = Sockets.in_dir(self.directory)
        self._number = 0
        self._beats = state is not None  # one that boots is still looking for its keyboard
        self._said = b""
        self._control: socket.socket | None = None
        self._memory = MemoryFile(memory, shared=state is None)
        share = "on" if self._memory.shared else "off"
        # One CPU: KVM patches the kernel's code when it makes its first VM ("static keys"), and with several QEMU 7.2
        # may go on with what it translated before: both then take the same trap for ever, once in some fifty VMs.
        argv = [
            *("qemu-system-x86_64", "-name", "nixbox-kvm-box", "-nodefaults", "-no-user-config", "-no-reboot"),
            *("-display", "none", "-M", "q35,memory-backend=mem", "-accel"),
            *(("tcg,thread=single", "-icount", "shift=0,sleep=on") if counting else ("tcg,thread=multi",)),
            *("-cpu", "EPYC,+svm,+npt", "-smp", "1", "-m", f"{MEMORY_MIB}M"),
            *("-object", f"memory-backend-file,id=mem,size={MEMORY_MIB}M,mem-path={memory},share={share}"),
            *("-kernel", str(kernel), "-initrd", str(initrd), "-append", _KERNEL_ARGS),
            *("-serial", f"file:{self.console}"),
            *("-qmp", f"unix:{self._sockets.monitor},server=on,wait=off"),
            *("-device", "virtio-serial-pci,romfile="),
            *("-chardev", f"socket,id=control,path={self._sockets.control},server=on,wait=off"),
            *("-device", "virtserialport,chardev=control,name=box.control"),
            *("-chardev", f"socket,id=shell,path={self._sockets.shell},server=on,wait=off"),
            *("-device", "virtserialport,chardev=shell,name=box.shell"),
            *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
            *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
            *("-fsdev", f"local,id=box,path={self.work},security_model=none"),
            *("-device", "virtio-9p-pci,fsdev=box,mount_tag=box"),
            *("-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net,romfile="),
            *(() if state is None else ("-incoming", "defer")),
        ]
        log = (self.directory / "qemu.log").open("wb")
        with log:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=partial(linux.end_with_parent, os.getpid()),
            )
        try:
            self._control = self._connect(self._sockets.control)
            if state is not None:
                Qemu().load(self._sockets, state)
                Qemu().resume(self._sockets)
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _connect(self, path: Path) -> socket.socket:
        """QEMU binds its sockets, the monitor's first, some milliseconds after it started."""
        deadline = time.monotonic() + _START_S
        while True:
            control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                control.connect(str(path))
            except OSError:
                control.close()
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise self._error("it does not start") from None
                time.sleep(0.005)
            else:
                return control

    def _error(self, what: str) -> BoxError:
        said = [
            file.read_text(errors="replace")[-2000:]
            for file in (self.directory / "qemu.log", self.console)
            if file.exists()
        ]
        return BoxError("\n".join([f"the emulated KVM host: {what}", *said]))

    def _send(self, line: str) -> None:
        assert self._control is not None
        try:
            self._control.sendall(line.encode() + b"\n")
        except OSError:
            raise self._error("it has ended") from None

    def expect(self, timeout_s: float) -> str:
        """The next line that the box says. Raises BoxError."""
        assert self._control is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._said:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._error(f"it did not answer within {timeout_s:g} s")
            self._control.settimeout(min(left, _BEAT_S))
            try:
                piece = self._control.recv(4096)
            except TimeoutError:
                self._beat()
                continue
            except OSError:
                piece = b""
            if not piece:
                raise self._error("it has ended")
            self._said += piece
        line, _, self._said = self._said.partition(b"\n")
        return line.decode(errors="replace").strip()

    def _beat(self) -> None:
        """Interrupt it: with guests of its own, it was seen to miss its timer's interrupt and to stand still until
        something else came ("rcu_preempt kthread timer wakeup didn't happen for 19607 jiffies"). A key does.
        """
        if not self._beats:
            return
        with contextlib.suppress(NixboxError), Qmp.connect(self._sockets.monitor, _BEAT_S) as qmp:
            qmp.execute("send-key", {"keys": [{"type": "qcode", "data": "shift"}]})

    def mount(self) -> None:
        """Give it the host's files. Raises BoxError."""
        self._send("mount")
        said = self.expect(_START_S)
        if said != "mounted":
            raise self._error(f"it was to mount, and says {said!r}")

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: str = "/tmp",
        env: Mapping[str, str] | None = None,
        timeout_s: float = _RUN_S,
    ) -> Done:
        """Run a command as root of the box. Raises BoxError; then the box is of no further use."""
        self._number += 1
        number = str(self._number)
        lines = [f"export {name}={shlex.quote(value)}" for name, value in (env or {}).items()]
        script = "\n".join([*lines, f"cd {shlex.quote(cwd)} || exit 126", f"exec {shlex.join(argv)}", ""])
        self._send(f"{number} {base64.b64encode(script.encode()).decode()}")
        words = self.expect(timeout_s).split()
        if len(words) != 4 or words[0] != number:
            raise self._error(f"it was to end request {number}, and says {words}")
        out, err = ((self.work / f"{number}.{end}").read_text(errors="replace") for end in ("out", "err"))
        return Done(int(words[1]), out, err, float(words[3]) - float(words[2]))

    def terminal(self) -> socket.socket:
        """The other end of /dev/virtio-ports/box.shell, for a shell of a person's. Raises BoxError."""
        return self._connect(self._sockets.shell)

    def save(self) -> bytes:
        """Stop it for good, its memory in the file that it was started with; returns the state of its devices."""
        Qemu().pause(self._sockets)
        return Qemu().save(self._sockets, self._memory)

    def end(self) -> None:
        """End it, and leave nothing."""
        if self._control is not None:
            self._control.close()
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def save(kernel: Path, initrd: Path, directory: Path, *, counting: bool = False) -> Saved:
    """Boot a box up to where it waits for its host's files, and keep it in `directory`."""
    memory = directory / "memory"
    with Box(kernel, initrd, memory, state=None, counting=counting) as box:
        if box.expect(_START_S) != "ready":
            raise BoxError("the emulated KVM host does not get ready")
        time.sleep(0.5)  # the last of its start goes on beside: let it become idle
        state = box.save()
    return Saved(kernel, initrd, memory, state, counting)


@contextmanager
def restored(saved: Saved) -> Iterator[Box]:
    """A box that goes on from a saved one, with the host's files mounted."""
    with Box(saved.kernel, saved.initrd, saved.memory, state=saved.state, counting=saved.counting) as box:
        box.mount()
        yield box
