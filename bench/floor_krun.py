"""The least that a boot on libkrun takes: cffi, the library and two processes, with nothing of nixbox.

`floor_krun.py SETTINGS` (a file of marshal's, see main) starts a child of this same file, which becomes the machine,
answers the guest's `boot` with the `go` that was made beforehand, and prints how many seconds after the child's start
the guest said `boot`, and `ready`. Keys, disk and network card are there before. Run as root, with `python -I -S`.
"""

from __future__ import annotations

import marshal  # not json, which brings `re`
import os
import sys

TYPE_CHECKING = False  # typing itself, like all that is imported below where it is used, would be time of the child's
if TYPE_CHECKING:
    from typing import Any

TAP = b"floor0"
_NET_FEATURES = 1 << 0 | 1 << 1 | 1 << 7 | 1 << 11  # virtio_net.h: checksums and segments of TCP over IPv4
_TUNSETIFF, _IFF_TAP = 0x400454CA, 0x0002 | 0x1000 | 0x4000  # linux/if_tun.h: TAP, NO_PI, VNET_HDR
_TUNSETPERSIST = 0x400454CB
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1  # linux/sockios.h, linux/if.h
_LIMIT_S = 120.0
_WARN = 2


def become(settings: dict[str, Any], console: int, guest: int) -> None:
    """Give libkrun its orders and become the machine."""
    sys.path[:0] = settings["modules"]
    import nixbox_krun  # type: ignore[import-not-found]  # libkrun's declarations for cffi, and no more

    ffi = nixbox_krun.ffi
    lib = ffi.dlopen(settings["library"], ffi.RTLD_LAZY)

    def call(name: str, *arguments: Any) -> int:
        result: int = getattr(lib, name)(*arguments)
        if result < 0:
            raise SystemExit(f"{name}: {os.strerror(-result)}")
        return result

    call("krun_init_log", 2, _WARN, 2, 1)
    context = call("krun_create_ctx")
    call("krun_disable_implicit_init", context)
    call("krun_set_vm_config", context, settings["vcpus"], settings["memory_mib"])
    call("krun_set_kernel", context, settings["kernel"].encode(), 1, ffi.NULL, settings["cmdline"].encode())
    call("krun_add_virtiofs3", context, b"/dev/root", settings["boot"].encode(), 0, True)
    call("krun_add_disk2", context, b"root", settings["root"].encode(), 0, True)
    call("krun_add_disk2", context, b"overlay", settings["overlay"].encode(), 0, False)
    card = ffi.new("uint8_t[6]", bytes.fromhex("525400123456"))
    call("krun_add_net_tap", context, ffi.new("char[]", TAP), card, _NET_FEATURES, 0)
    ports = call("krun_add_virtio_console_multiport", context)
    call("krun_add_console_port_tty", context, ports, b"", console)
    call("krun_add_console_port_inout", context, ports, b"nixbox.control", guest, guest)
    call("krun_start_enter", context)


def measure(argv: list[str], go: bytes) -> dict[str, float]:
    """Start the machine; returns seconds to `boot` and to `ready`, and ends it."""
    import select
    import socket
    import time

    ours, guest = socket.socketpair()
    terminal, console = os.openpty()
    for fd in (guest.fileno(), console):
        os.set_inheritable(fd, True)
    begun = time.monotonic()
    child = os.posix_spawn(argv[0], [*argv, str(console), str(guest.fileno())], os.environ)
    guest.close()
    os.close(console)
    said, found = b"", dict[str, float]()
    try:
        while "ready" not in found:
            ready, _, _ = select.select([ours.fileno(), terminal], [], [], _LIMIT_S)
            if not ready:
                raise SystemExit(f"the guest says nothing more after {said!r}")
            if terminal in ready:
                os.read(terminal, 1 << 16)  # or the guest waits for room to write
            if ours.fileno() in ready:
                data = ours.recv(4096)
                if not data:
                    raise SystemExit("the machine has ended")
                *lines, said = (said + data).split(b"\n")
                for word in (line.split()[0].decode() for line in lines if line.split()):
                    found[word] = time.monotonic() - begun
                    if word == "boot":
                        ours.sendall(go)
        return found
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def make_card() -> None:
    """A TAP device that is up, and stays when nobody holds it."""
    import fcntl
    import socket
    import struct

    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", TAP, _IFF_TAP))
    fcntl.ioctl(device, _TUNSETPERSIST, 1)
    os.close(device)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", TAP, _IFF_UP))


def main() -> None:
    """The one who measures; with two descriptors behind the settings' name: the machine."""
    with os.fdopen(os.open(sys.argv[1], os.O_RDONLY), "rb") as file:
        settings = marshal.load(file)
    if len(sys.argv) > 2:
        become(settings, int(sys.argv[2]), int(sys.argv[3]))
        return
    make_card()
    found = measure([sys.executable, "-I", "-S", __file__, sys.argv[1]], settings["go"].encode())
    print(found["boot"], found["ready"])


if __name__ == "__main__":
    main()
