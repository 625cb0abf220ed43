"""The libkrun backend: a child process that becomes the machine. The fastest boot where KVM works.

Its templates are the library's own snapshots, where a build has them. It has no hot-plug: directories of the host are
there from the start, behind devices that a template has as well. Its network card is the same TAP device, behind the
same filter, as QEMU's; there is no vsock device, which libkrun would use to reach the host's network past that filter
(docs/decisions/025-libkrun.md, 029-krun-templates.md).
"""

from __future__ import annotations

import contextlib
import fcntl
import marshal
import os
import select
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from nixbox import run
from nixbox.errors import ConfigError, HostError, NixboxError
from nixbox.machine import libkrun
from nixbox.machine.backend import (
    Features,
    MemoryFile,
    Network,
    Sockets,
    VmSpec,
    architecture,
    check_tools,
    disks,
    slot_tag,
)
from nixbox.plan.model import Queue
from nixbox.plan.network import GUEST_ADDRESS, GUEST_SHELL_PORT, NETWORK_MTU
from nixbox.programs import Program, Programs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

KERNEL_ARGS = (
    "console=hvc0",
    "quiet",
    "panic=-1",
    "reboot=k",  # the only end of a machine that libkrun notices
    "root=/dev/root",
    "rootfstype=virtiofs",
    "ro",
    "init=/init",
    "cryptomgr.notests",
    "random.trust_cpu=on",
    # A page that the host brought in for a guest which was saved since is waited for ever, by a CPU that never halts.
    "no-kvmapf",
    # For nix/guest: disks have no serial numbers here, the card no MTU, sessions come over the network, and no device
    # tells that a saved guest goes on somewhere else.
    "nixbox.disks=vda,vdb,vdc,vdd",
    f"nixbox.mtu={NETWORK_MTU}",
    "nixbox.shell=net",
    "nixbox.off=reboot",
    "nixbox.random=host",
)
CHILD = "nixbox.machine.krun_child"
_TAP = "tap0"
_START_LIMIT_S = 30.0
_ASK_TIMEOUT_S = 2.0
_SAVE_TIMEOUT_S = 600.0  # a large guest on a slow disk
_STATE_MIB = 16
_TUNSETPERSIST, _TUNSETOWNER = 0x400454CB, 0x400454CC  # linux/if_tun.h
_ELSEWHERE = "`--backend qemu` does without"
_ENTITLEMENT = "com.apple.security.hypervisor"


class Krun:
    """Backend `krun`: libkrun through cffi. `library` is the path that the user's settings name, if any."""

    name = "krun"
    kernel, initrd = "krun/vmlinux", "krun/boot"

    def __init__(self, library: str | None = None) -> None:
        self._configured = library

    @cached_property
    def _library(self) -> Path:
        """The library's file, looked for once. Raises HostError."""
        return libkrun.find(self._configured)

    @cached_property
    def features(self) -> Features:
        """It has templates where the library has snapshots."""
        try:
            templates = libkrun.has_snapshots(self._library)
        except (HostError, OSError, ValueError):  # `check_host`, and the start, have the words
            templates = False
        return Features(templates=templates, restore=False, hot_plug=False, emulates=False)

    def check_host(self) -> None:
        """The library, and what goes with a machine. Raises HostError."""
        if sys.platform == "darwin":  # not run on the machines that this was written on
            _check_entitlement()
        elif architecture() != "x86_64":
            raise HostError(f"the backend krun runs on x86_64 and on macOS, not on {architecture()}", hint=_ELSEWHERE)
        libkrun.find(self._configured)
        check_tools()

    def check(self, spec: VmSpec) -> None:
        """All that libkrun answers badly or not at all (`check` below)."""
        check(spec)

    def expect(self, programs: Programs) -> None:
        """The process that becomes the machine, with cffi."""
        with contextlib.suppress(HostError):  # the start has the words for it
            programs.expect(CHILD, [str(libkrun.compiled()), libkrun.cffi_directory()])

    def version(self) -> str:
        """The library's file: it does not tell its version."""
        info = self._library.stat()
        return f"libkrun {self._library} ({info.st_size} bytes, {info.st_mtime_ns})"

    def shape(self, spec: VmSpec) -> list[str]:
        """What the guest's devices are: their number, and the size of its disk, which the guest asks only once."""
        sidecars = [f"sidecar={path}" for path in spec.sidecars]
        return [f"disk={spec.disk_mib}", *sidecars, f"directories={spec.slots}", *KERNEL_ARGS]

    def start(
        self,
        spec: VmSpec,
        sockets: Sockets,
        network: Network,
        log: Path,
        pass_fds: Sequence[int],
        programs: Programs | None = None,
    ) -> int:
        """Start the child and wait until libkrun has taken its orders. Raises ConfigError, HostError, NixboxError."""
        check(spec)
        library = self._library
        room = sockets.control.parent / "jail"
        room.mkdir(mode=0o700, exist_ok=True)
        with sockets.listening() as served:
            listeners = [sock.fileno() for sock in served]
            settings = _settings(spec) | {
                "library": str(library),
                "modules": [str(libkrun.compiled()), libkrun.cffi_directory()],
                "needed": list(libkrun.NEEDED),
                "log": str(log),
                "room": str(room),
                "sockets": listeners,
                "namespaces": (network.user, network.net),
                "parent": os.getpid() if spec.bound else None,
            }
            _let_go(network.tap)
            # What is to end with this process has to be its own child.
            programs = Programs() if spec.bound or programs is None else programs
            with _memory(spec) as memory:
                settings["memory"] = memory
                # What the memory's file came as can be written to: the process gets its own, which cannot.
                given = [fd for fd in pass_fds if memory is None or not os.path.sameopenfile(fd, memory)]
                inherited = (*listeners, *settings["namespaces"], *given, *(() if memory is None else (memory,)))
                process = programs.start(CHILD, f"nixbox-krun-{spec.name}", log=log, pass_fds=inherited)
                _await(process, settings, spec)
        return process.pid

    def status(self, sockets: Sockets) -> str:
        """`running`: its process answers. A disk that is full is the guest's to notice."""
        return _ask(sockets, b"status\n").decode(errors="replace").strip()

    def quit(self, sockets: Sockets) -> None:
        """End the process."""
        _ask(sockets, b"quit\n")

    def pause(self, sockets: Sockets) -> None:
        """Only one that was started to be saved can be."""
        _ordered(sockets, b"pause\n", timeout_s=_SAVE_TIMEOUT_S)

    def resume(self, sockets: Sockets) -> None:
        """Let a machine that was given its state begin; nothing pauses it later."""
        _ordered(sockets, b"resume\n")

    def save(self, sockets: Sockets, memory: MemoryFile) -> bytes:
        """The library's snapshot: two files of its own, in an archive, and the memory, in a new file at `memory`.

        The old one, if this machine was itself restored, is what its memory began with: it must stay as it is.
        """
        memory.path.unlink(missing_ok=True)
        with memory.path.open("xb") as file:
            return _ordered(sockets, b"save\n", fd=file.fileno(), timeout_s=_SAVE_TIMEOUT_S)

    def load(self, sockets: Sockets, state: bytes) -> None:
        """Hand the library's files over."""
        _ordered(sockets, b"load %d\n%s" % (len(state), state))

    def move(self, source: Sockets, target: Sockets) -> None:
        """Not possible."""
        raise self._cannot("be copied")

    def attach(self, sockets: Sockets, tag: str, connection: int) -> None:
        """Not possible."""
        raise self._cannot("be given a directory while it runs")

    def queues(self, sockets: Sockets, tag: str) -> tuple[Queue, ...]:
        """Nobody else sees them."""
        return ()

    def detach(self, sockets: Sockets, tag: str) -> bool:
        """Not possible: the guest may only unmount it."""
        return False

    def _cannot(self, what: str) -> HostError:
        return HostError(f"a running machine of the backend krun cannot {what}", hint=_ELSEWHERE)


def check(spec: VmSpec) -> None:
    """All that libkrun answers badly or not at all is looked at before: files, CPUs, memory.

    A disk that it cannot open is a bare error number, a directory that is missing hangs the machine for ever.
    Raises ConfigError for what the config asks for, NixboxError for files.
    """
    for path, what in ((spec.kernel, "the image's kernel for libkrun"), (spec.root, "the image's root")):
        if not path.is_file():
            raise NixboxError(f"{what} is not there: {path}", hint="`nixbox build` makes the image anew")
    with spec.kernel.open("rb") as file:
        head = file.read(20)
    if head[:4] != b"\x7fELF" or head[18:20] != b"\x3e\x00":
        raise NixboxError(f"{spec.kernel} is no kernel for this machine (ELF, x86-64)", hint="`nixbox lock` anew")
    if not (spec.initrd / "init").is_file():
        raise NixboxError(f"the image has no {spec.initrd}/init to boot", hint="`nixbox build` makes it anew")
    for _, path, readonly in disks(spec):
        mend = "`nixbox build` makes it anew" if readonly else "restore it, or `nixbox rm` the machine"
        try:
            size = path.stat().st_size
            os.close(os.open(path, os.O_RDONLY if readonly else os.O_RDWR))
        except OSError as error:
            raise NixboxError(f"the disk {path} cannot be opened: {error.strerror}", hint=mend) from None
        if size == 0 or size % 512:
            raise NixboxError(f"the disk {path} is damaged: {size} bytes are no whole sectors", hint=mend)
    host_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    if spec.memory_mib > host_mib:
        raise ConfigError(
            f"resources.memory: {spec.memory_mib} MiB is more than this host has ({host_mib} MiB)",
            hint='lower it, e.g. memory = "2GiB"',
        )


def _settings(spec: VmSpec) -> dict[str, Any]:
    saves = spec.memory_file is not None and spec.memory_file.shared
    return {
        "incoming": spec.incoming,
        "saves": saves,
        # Room for a saved machine: some small files, and a guest's memory if it is this one that is to be saved.
        "state_mib": _STATE_MIB + (spec.memory_mib if saves else 0) if saves or spec.incoming else 0,
        "kernel": str(spec.kernel),
        "boot": str(spec.initrd),
        "cmdline": " ".join(KERNEL_ARGS),
        "disks": [{"id": name, "path": str(path), "readonly": readonly} for name, path, readonly in disks(spec)],
        "vcpus": spec.vcpus,
        "memory_mib": spec.memory_mib,
        "console_log": str(spec.console_log),
        "tap": _TAP,
        "address": (GUEST_ADDRESS, GUEST_SHELL_PORT),
        "slots": [slot_tag(number) for number in range(spec.slots)],
        "shares": [
            {
                "source": str(share.source),
                "inode": [share.inode.device, share.inode.number],
                "readonly": share.readonly,
                "masks": [[str(path), [inode.device, inode.number]] for path, inode in share.masks],
            }
            for share in spec.shares
        ],
    }


@contextmanager
def _memory(spec: VmSpec) -> Iterator[int | None]:
    """The file that a restored machine's memory begins with, to be read only."""
    if not spec.incoming or spec.memory_file is None:
        yield None
        return
    with spec.memory_file.path.open("rb") as file:
        yield file.fileno()


def _let_go(tap: int) -> None:
    """Let the device stay without a holder, this user's to take: libkrun opens it by its name, once nobody has it."""
    fcntl.ioctl(tap, _TUNSETOWNER, os.geteuid())
    fcntl.ioctl(tap, _TUNSETPERSIST, 1)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), tap, inheritable=False)  # the number stays its owner's to close


def _await(process: Program, settings: dict[str, Any], spec: VmSpec) -> None:
    """Hand the child its settings, and wait for its word. Raises ConfigError, HostError, NixboxError."""
    assert process.stdin is not None and process.stdout is not None
    with process.stdout as said:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(marshal.dumps(settings))
            process.stdin.close()
        answer = said.read() if select.select([said], [], [], _START_LIMIT_S)[0] else b""  # its end of it is closed
    if not answer:
        process.kill()
        process.wait()
        hint = f"`nixbox logs` has its last words; without any, {settings['library']} may be damaged"
        raise NixboxError("libkrun's process ended or did not answer", hint=hint)
    what, code, detail = answer.decode(errors="replace").split("\0", 2)
    if what:
        process.wait()
        raise explained(what, int(code), detail, settings["library"], spec)


def explained(what: str, code: int, detail: str, library: str, spec: VmSpec) -> NixboxError:
    """What to make of a refusal (krun_child.Refused)."""
    why = detail or (os.strerror(code) if code else "it does not say why")
    if what == "dlopen":
        mend = "take the one for this machine's architecture: pip install 'nixbox[krun]'; " + _ELSEWHERE
        return HostError(f"{library} cannot be loaded: {why}", hint=mend)
    if what == "symbol":
        mend = "a newer libkrun, with networks and disks, has it: pip install 'nixbox[krun]'; " + _ELSEWHERE
        return HostError(f"{library} lacks {why}", hint=mend)
    if what == "vcpus":
        return ConfigError(
            f"resources.vcpus: {spec.vcpus} is more than libkrun can give a machine here ({why})",
            hint=f"at most vcpus = {why}",
        )
    if what == "jail":
        return HostError(f"the machine's process cannot be jailed: {why}", hint="`nixbox doctor` tells more")
    if what == "system":
        return NixboxError(f"the machine's process cannot begin: {why}", hint="`nixbox logs` has its last words")
    return NixboxError(f"libkrun refuses {what}: {why}", hint=f"its own words: `nixbox logs`; {_ELSEWHERE}")


def _ask(sockets: Sockets, words: bytes, *, fd: int | None = None, timeout_s: float = _ASK_TIMEOUT_S) -> bytes:
    """Say something to the machine's process; returns all that it answers. Raises NixboxError."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_s)
            sock.connect(str(sockets.monitor))
            sent = socket.send_fds(sock, [words], [] if fd is None else [fd])
            sock.sendall(words[sent:])
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while data := sock.recv(1 << 16):
                answer += data
            return answer
    except ConnectionResetError:  # it ended at the word
        return b""
    except OSError as error:
        raise NixboxError(f"the machine's process does not answer: {error}") from None


def _ordered(sockets: Sockets, words: bytes, *, fd: int | None = None, timeout_s: float = _ASK_TIMEOUT_S) -> bytes:
    """`_ask` for something that can fail; returns what comes with its success. Raises NixboxError."""
    answer = _ask(sockets, words, fd=fd, timeout_s=timeout_s)
    word, _, rest = answer.partition(b"\n")
    if word == b"ok":
        return rest
    if not answer:
        raise NixboxError("the machine's process has ended", hint="`nixbox logs` has its last words")
    what, why = words.split(maxsplit=1)[0].decode(), answer.decode(errors="replace").strip()
    raise NixboxError(f"libkrun cannot {what} the machine: {why}", hint=_ELSEWHERE)


def _check_entitlement() -> None:  # macOS; not run on the machines that this was written on
    """Apple's hypervisor is for programs that are signed for it: this Python has to be."""
    argv = ["codesign", "--display", "--entitlements", "-", "--xml", sys.executable]
    said = run.run(argv, timeout_s=20, check=False).stdout
    if _ENTITLEMENT not in said:
        raise HostError(
            f"{sys.executable} may not use Apple's hypervisor: it lacks the entitlement {_ENTITLEMENT}",
            hint="sign it: codesign --sign - --force --entitlements FILE "
            + sys.executable
            + " (FILE: a property list with that key set to true)",
        )
