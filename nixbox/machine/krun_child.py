"""The process that becomes a libkrun machine: it jails itself, gives the library its orders and never returns.

Started without the site's packages and with few imports: a machine's boot waits for it. Its settings come on
standard input (krun.Krun.start), its answer goes to standard output, and what libkrun itself says goes to standard
error, the machine's vm.log. From the jail on it sees the machine's own files, two devices and itself.
"""

from __future__ import annotations

import _thread
import marshal
import os
import sys
import time

from nixbox import jails, light, linux
from nixbox.machine import krun_snapshots, krun_timer, relay
from nixbox.plan.network import GUEST_MAC, mac_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_ELF = 1  # KRUN_KERNEL_FORMAT_ELF
_RAW = 0  # KRUN_DISK_FORMAT_RAW
_WARN, _NO_STYLE, _NO_ENV = 2, 2, 1  # krun_init_log
# virtio_net.h: checksums and segments of TCP over IPv4, both ways.
_NET_FEATURES = 1 << 0 | 1 << 1 | 1 << 7 | 1 << 11
_DEVICES = ("/dev/kvm", "/dev/net/tun")
_PANICKED = b"panicked at"
_MEMORY = "/memory"
_CHUNK = 1 << 16
_ORDER_TIMEOUT_S = 5.0  # for its words, which come at once
_BOOTING_S = 60.0  # that long the log is looked at often: a device that cannot be set up panics then
_EXIT_CODE = 125
# libkrun writes the number, rounded up to a power of two, into a byte of CPUID: more is "VcpuCountOverflow".
_MOST_VCPUS = 128


class Refused(Exception):
    """libkrun, or the system, refused a step: `what` it was, its `code` (an errno, or 0) and a `detail` in words."""

    def __init__(self, what: str, code: int = 0, detail: str = "") -> None:
        super().__init__(what)
        self.what, self.code, self.detail = what, code, detail


class Library:
    """libkrun's functions, each looked up when it is called."""

    def __init__(self, path: str, ffi: Any, needed: list[str]) -> None:
        self.ffi = ffi
        try:
            self._lib = ffi.dlopen(path, ffi.RTLD_LAZY)  # lazily: graphics libraries are no part of some builds
        except OSError as error:
            raise Refused("dlopen", detail=str(error)) from None
        missing = [name for name in needed if not self.has(name)]
        if missing:
            raise Refused("symbol", detail=", ".join(missing))

    def has(self, name: str) -> bool:
        """Whether this build has a function."""
        try:
            return getattr(self._lib, name) is not None
        except (AttributeError, self.ffi.error):
            return False

    def call(self, name: str, *arguments: Any) -> int:
        """Call a function. Raises Refused when it returns an error, with libkrun's own words if it has some."""
        result: int = getattr(self._lib, name)(*arguments)
        if result < 0:
            said = self._lib.krun_get_last_error() if self.has("krun_get_last_error") else self.ffi.NULL
            raise Refused(
                name, -result, "" if said == self.ffi.NULL else self.ffi.string(said).decode(errors="replace")
            )
        return result


def _join(user: int, net: int) -> None:
    """Enter the machine's namespaces, with all rights over them until the jail; nothing is kept that leads back."""
    linux.join_network(user, net)
    os.close(user)
    os.close(net)


def enter_jail(settings: dict[str, Any]) -> None:
    """Leave everything behind but the machine's files, under short names, and the two devices. Raises Refused.

    In a user namespace below that of its network: there it has rights until it gives them up, and over its network
    it has none from the first moment.
    """
    step = "namespaces"
    try:
        before = _descriptors()
        files = {f"/disk{i}": disk["path"] for i, disk in enumerate(settings["disks"])}
        files |= {"/kernel": settings["kernel"]} | {name: name for name in _DEVICES}
        linux.own_user_namespace(linux.CLONE_NEWNS | linux.CLONE_NEWIPC, jails.USER)
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_SLAVE)
        root = settings["room"]
        linux.mount("tmpfs", root, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0755,size=64k")
        for name, path in files.items():
            step = path
            os.makedirs(os.path.dirname(root + name), exist_ok=True)
            os.close(os.open(root + name, os.O_WRONLY | os.O_CREAT))
            linux.mount(path, root + name, None, linux.MS_BIND)
        step = settings["boot"]
        os.mkdir(root + "/boot")
        jails.bind_closed(os.open(settings["boot"], os.O_PATH | os.O_DIRECTORY), root + "/boot")
        for number, _ in enumerate(settings["slots"]):
            os.mkdir(f"{root}/share{number}")
        for number, words in enumerate(settings["shares"]):
            share = _share(words)
            step = str(share.source)
            target = f"{root}/share{number}"
            jails.bind_share(share, share.open(), target)
            for path, inode in share.masks:
                jails.mask(target, path, inode)
        if settings["memory"] is not None:
            step = "the template"
            _bind_memory(settings["memory"], root + _MEMORY)
        step = "the jail"
        if settings["state_mib"]:
            os.mkdir(root + krun_snapshots.ROOM)
            size = f"mode=0700,size={settings['state_mib']}m"
            linux.mount("tmpfs", root + krun_snapshots.ROOM, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, size)
        jails.bind_own_process(root)
        jails.close(root)
        for fd in _descriptors() - before:  # of directories as the host has them: ways out, past every mask
            os.close(fd)
        jails.raise_limit()
        linux.give_up()
        # This process executes nothing, so it would keep every right over its mounts, and whoever takes it over could
        # undo the masks. These two are worth nothing where there is one user, but without them some builds' file
        # system (my_uid) shows that user's files as root's.
        linux.keep_only(linux.CAP_SETGID, linux.CAP_SETUID)
        linux.seccomp(jails.no_setuid(os.uname().machine))
    except OSError as error:
        raise Refused("jail", error.errno or 0, f"{step}: {error.strerror}") from None


def _bind_memory(fd: int, target: str) -> None:
    """Bind a template's memory, read-only: a descriptor alone could be opened again for writing (/proc/self/fd).

    A file without a name is nobody else's: a machine's own copy, or that of a template which has just been removed.
    """
    try:
        named = os.open(os.readlink(f"/proc/self/fd/{fd}"), os.O_PATH | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    if os.path.samestat(os.fstat(named), os.fstat(fd)):
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT))
        jails.bind_closed(named, target)


def _descriptors() -> set[int]:
    """All that is open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with light.suppress(OSError):  # that which listed them is closed by now
            os.fstat(int(name))
            found.add(int(name))
    return found


def _share(words: dict[str, Any]) -> jails.Share:
    masks = tuple((path, jails.Inode(*inode)) for path, inode in words["masks"])
    return jails.Share(words["source"], jails.Inode(*words["inode"]), words["readonly"], masks)


def configure(lib: Library, settings: dict[str, Any], console: int, guest: int) -> int:
    """Give libkrun the whole machine, piece by piece; returns its context. Raises Refused."""
    ffi = lib.ffi
    lib.call("krun_init_log", -1, _WARN, _NO_STYLE, _NO_ENV)
    most = _MOST_VCPUS
    if lib.has("krun_get_max_vcpus"):
        most = min(most, lib.call("krun_get_max_vcpus"))
    if settings["vcpus"] > most:
        raise Refused("vcpus", detail=str(most))
    context = lib.call("krun_create_ctx")
    # Version 1 has these of itself; its vsock device would be a way to the host's network past every filter.
    for name in ("krun_disable_implicit_vsock", "krun_disable_implicit_console"):
        if lib.has(name):
            lib.call(name, context)
    lib.call("krun_disable_implicit_init", context)
    lib.call("krun_set_vm_config", context, settings["vcpus"], settings["memory_mib"])
    lib.call("krun_set_kernel", context, b"/kernel", _ELF, ffi.NULL, settings["cmdline"].encode())
    if lib.has("krun_set_exec"):
        # Without these libkrun hands the guest this process's own environment.
        nothing = ffi.new("char *[]", [ffi.NULL])
        lib.call("krun_set_exec", context, b"/init", nothing, nothing)
    lib.call("krun_add_virtiofs3", context, b"/dev/root", b"/boot", 0, True)
    for number, disk in enumerate(settings["disks"]):
        path = f"/disk{number}".encode()
        lib.call("krun_add_disk2", context, disk["id"].encode(), path, _RAW, disk["readonly"])
    closed = [share["readonly"] for share in settings["shares"]]
    for number, tag in enumerate(settings["slots"]):
        readonly = closed[number] if number < len(closed) else True  # nothing is behind a template's
        lib.call("krun_add_virtiofs3", context, tag.encode(), f"/share{number}".encode(), 0, readonly)
    tap = ffi.new("char[]", settings["tap"].encode())
    mac = ffi.new("uint8_t[6]", mac_bytes(GUEST_MAC))
    lib.call("krun_add_net_tap", context, tap, mac, _NET_FEATURES, 0)
    ports = lib.call("krun_add_virtio_console_multiport", context)
    lib.call("krun_add_console_port_tty", context, ports, b"", console)
    lib.call("krun_add_console_port_inout", context, ports, b"nixbox.control", guest, guest)
    return context


# --- the threads beside the VM ---


def _keep_console(terminal: int, log: int) -> None:
    with light.suppress(OSError):
        while data := os.read(terminal, 1 << 16):
            os.write(log, data)


def _watch_log(log: int) -> None:
    """A device's thread that panics leaves a VM that hangs for ever: end it."""
    begun = time.monotonic()
    offset = os.fstat(log).st_size
    rest = b""
    while True:
        time.sleep(0.1 if time.monotonic() - begun < _BOOTING_S else 5.0)
        data = rest + os.pread(log, 1 << 16, offset)
        offset += len(data) - len(rest)
        rest = data[-len(_PANICKED) :]
        if _PANICKED in data:
            os._exit(_EXIT_CODE)


class Monitor:
    """What the machine's process is asked, an order a connection (krun.Krun): `status`, `quit`, `save` and so on."""

    def __init__(self, library: Library, context: int, *, incoming: bool) -> None:
        self.library, self.context = library, context
        self._waits = incoming
        self._going = _thread.allocate_lock()
        self._going.acquire()

    def wait(self) -> None:
        """Until the VM may begin: one that is given a state is told when."""
        if self._waits:
            self._going.acquire()

    def serve(self, listener: relay.Connection) -> None:
        """Answer for ever."""
        while True:
            asker, _ = listener.accept()
            with asker, light.suppress(OSError):
                asker.settimeout(_ORDER_TIMEOUT_S)
                words, fds = light.receive_fds(asker, _CHUNK, 1)
                while data := asker.recv(_CHUNK):
                    words += data
                asker.sendall(self._answer(words, fds))
                for fd in fds:
                    os.close(fd)

    def _answer(self, words: bytes, fds: list[int]) -> bytes:
        order, _, rest = words.partition(b"\n")
        try:
            match order.split():
                case [b"quit"]:
                    os._exit(0)  # what the guest has written is in the files already
                case [b"status"]:
                    return b"inmigrate\n" if self._waits else b"running\n"
                case [b"load", _]:
                    krun_snapshots.load(self.library, self.context, rest)
                    return b"ok\n"
                case [b"resume"]:
                    if self._waits:
                        self._waits = False
                        self._going.release()
                    return b"ok\n"
                case [b"pause"]:
                    krun_snapshots.pause()
                    return b"ok\n"
                case [b"save"] if len(fds) == 1:
                    return b"ok\n" + krun_snapshots.save(fds[0])
        except Refused as refused:
            return f"{refused.what}: {refused.detail or os.strerror(refused.code)}\n".encode()
        except (krun_snapshots.Refuses, OSError, ValueError) as error:
            return f"{error}\n".encode()
        return b"?\n"


def _begin_threads(
    settings: dict[str, Any], ours: Monitor, guest: light.Socket, terminal: int, console: int, log: int
) -> None:
    control, monitor, shell = (light.Socket(fileno=fd) for fd in settings["sockets"])
    address, port = settings["address"]
    begin = _thread.start_new_thread
    begin(relay.serve_control, (control, guest))
    begin(relay.serve_shell, (shell, (address, port)))
    begin(ours.serve, (monitor,))
    begin(_keep_console, (terminal, console))
    begin(_watch_log, (log,))


# --- the process ---


def _answer(what: str = "", code: int = 0, detail: str = "") -> None:
    """What libkrun refused, if it did."""
    with light.suppress(OSError):
        os.write(1, "\0".join((what, str(code), detail)).encode())


def _give_up(refused: Refused) -> NoReturn:
    if refused.what != "krun_start_enter":
        _answer(refused.what, refused.code, refused.detail)
    why = os.strerror(refused.code) if refused.code else ""
    words = " ".join(word for word in (why, refused.detail) if word)
    print(f"nixbox: libkrun refuses {refused.what}: {words or 'it does not say why'}", file=sys.stderr, flush=True)
    os._exit(_EXIT_CODE)


def prepare(modules: list[str]) -> None:
    """Have cffi and the library's declarations in memory, before a machine is known to need them."""
    sys.path[:0] = modules
    __import__("nixbox_krun")  # made by libkrun.compiled


def main() -> None:
    """`krun_child`: settings on standard input; becomes the VM."""
    settings = marshal.load(sys.stdin.buffer)  # noqa: S302 (of krun.Krun, which started it)
    linux.make_room()
    os.umask(0o077)
    light.signal(light.SIGINT, light.SIG_DFL)  # Python's own handler never runs while the VM does
    light.signal(light.SIGPIPE, light.SIG_IGN)
    sys.path[:0] = settings["modules"]
    try:
        _join(*settings["namespaces"])
        declared = __import__("nixbox_krun")  # made by libkrun.compiled
        library = Library(settings["library"], declared.ffi, settings["needed"])
        terminal, console = os.openpty()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        console_log = os.open(settings["console_log"], flags, 0o600)
        log = os.open(settings["log"], os.O_RDONLY | os.O_CLOEXEC)
        enter_jail(settings)
        if settings["parent"] is not None:
            linux.end_with_parent(settings["parent"])
        ours, guest = light.socket_pair(light.SOCK_STREAM)
        context = configure(library, settings, console, guest.fileno())
        memory = settings["memory"]
        if memory is not None and os.path.exists(_MEMORY):
            os.close(memory)
            memory = os.open(_MEMORY, os.O_RDONLY)
        krun_snapshots.prepare(library, context, saves=settings["saves"], memory=memory)
        served = Monitor(library, context, incoming=settings["incoming"])
        _begin_threads(settings, served, ours, terminal, console_log, log)
        _answer()
        os.dup2(2, 1)  # from here on every word is for the log
        krun_timer.skip(krun_timer.REINJECT_CONTROL, os.uname().machine)
        served.wait()
        library.call("krun_start_enter", context)
    except Refused as refused:
        _give_up(refused)
    except OSError as error:
        _give_up(Refused("system", error.errno or 0, str(error)))
