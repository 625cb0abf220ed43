"""libkrunfw: where it is, and where in it the kernel lies that machines on libkrun boot.

It is a shared library whose data is a kernel's memory image, ready to be put at an address of the guest
(libkrunfw's README; `krunfw_get_kernel` in libkrun's src/vmm). The image build cuts that out of the file, so what
is found out here is the place in the *file*.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nixbox import run
from nixbox.errors import HostError, NixboxError

if TYPE_CHECKING:
    from nixbox.image.lock import KrunKernel

FILE: Final = "libkrunfw.so.5"  # the name under which libkrun loads it: 5 is the version of its interface
PACKAGE = "smolmachines"  # the one on PyPI that carries it, in its module `smol`
_MODULE = "smol"
_INSTALL = "pip install 'nixbox[krun]'"
_READ_LIMIT_S = 60.0


def locate(library: Path | None = None) -> Path | None:
    """The libkrunfw of this host, or None: `NIXBOX_LIBKRUNFW`, beside `library` (libkrun), in the package `smol`,
    or what the loader knows. Raises HostError when the variable names no file.
    """
    if named := os.environ.get("NIXBOX_LIBKRUNFW"):
        if not Path(named).is_file():
            raise HostError(f"NIXBOX_LIBKRUNFW names {named}, which is no file", hint=f"unset it, or: {_INSTALL}")
        return Path(named).absolute()
    places = [library.parent, library.resolve().parent] if library else []
    # A module at the top level is found without running anything of it.
    spec = importlib.util.find_spec(_MODULE)
    places += [Path(place) for place in (spec.submodule_search_locations or () if spec else ())]
    for place in places:
        if (place / FILE).is_file():
            return (place / FILE).absolute()
    return _of_the_loader()


def find(library: Path | None = None) -> Path:
    """`locate`, where there must be one. Raises HostError."""
    found = locate(library)
    if found is None:
        raise HostError(f"{FILE}, which has libkrun's kernel, is not on this host", hint=_INSTALL)
    return found


def _of_the_loader() -> Path | None:
    """What `ldconfig -p` lists, a line each: `libkrunfw.so.5 (libc6,x86-64) => /usr/lib/…/libkrunfw.so.5`."""
    if run.find_tool("ldconfig") is None:
        return None
    listed = run.run(["ldconfig", "-p"], timeout_s=10, check=False).stdout
    for name, path in re.findall(r"^\s*(\S+) \(.*\) => (/.*)$", listed, re.MULTILINE):
        if name == FILE and Path(path).is_file():
            return Path(path)
    return None


def origin(path: Path) -> str:
    """Where a libkrunfw is from, in words: `smolmachines 1.32.2`, or `libkrunfw`."""
    from importlib import metadata

    try:
        package = metadata.distribution(PACKAGE)
        theirs = Path(str(package.locate_file(f"{_MODULE}/{FILE}"))).resolve() == path.resolve()
        return f"{PACKAGE} {package.version}" if theirs else "libkrunfw"
    except metadata.PackageNotFoundError:
        return "libkrunfw"


def inspect(path: Path) -> KrunKernel:
    """What a lock says of this libkrunfw.

    The library is asked, in a child process: one that is cut short ends whoever touches its last pages (SIGBUS).
    Raises HostError on a host of another architecture, NixboxError for a file that is no (whole) libkrunfw.
    """
    from nixbox.image.lock import KrunKernel

    if platform.machine() != "x86_64":
        raise HostError(
            f"nixbox takes libkrun's kernel on x86_64 hosts only so far; this one is {platform.machine()}",
            hint="machines on QEMU run here",
        )
    entries = [str(Path(entry).absolute()) for entry in sys.path]
    argv = [sys.executable, "-I", "-c", _CHILD, str(path.absolute()), *entries]
    done = run.run(argv, timeout_s=_READ_LIMIT_S, check=False)
    hint = f"{_INSTALL} --force-reinstall brings a whole one; NIXBOX_LIBKRUNFW names another"
    if done.code < 0:
        how = signal.strsignal(-done.code)
        raise NixboxError(f"{path} is no whole libkrunfw: reading it ended with `{how}`", hint=hint)
    try:
        said: dict[str, Any] = json.loads(done.stdout.rpartition("\n")[2])
    except ValueError:
        raise NixboxError(f"{path} could not be read as a libkrunfw:\n{done.stderr.strip()}", hint=hint) from None
    if fault := said.get("fault"):
        raise NixboxError(f"{path} is no libkrunfw that can be used: {fault}", hint=hint)
    return KrunKernel(file=FILE, origin=origin(path), **said)


# --- the child ----------------------------------------------------------------------------------------------

# Our own sys.path is handed over, as for the probe of KVM (machine/kvm.py).
_CHILD = """\
import sys
sys.path[:] = sys.argv[2:]
from nixbox.image.krunfw import child
child(sys.argv[1])
"""
# libkrunfw's interface 4 and 5. The sizes are those of 64-bit hosts.
_INTERFACE = "char *krunfw_get_kernel(uint64_t *load_addr, uint64_t *entry_addr, size_t *size);"


class _UnusableError(Exception):
    """Why a file cannot serve; stays inside the child."""


def child(path: str) -> None:
    """Print what `_read` finds, or its fault, as JSON on the last line."""
    try:
        said = _read(path)
    except _UnusableError as error:
        said = {"fault": str(error)}
    print("\n" + json.dumps(said), end="", flush=True)


def _read(path: str) -> dict[str, str | int]:
    """Load a libkrunfw and find its kernel in the file's own bytes."""
    from cffi import FFI

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise _UnusableError(str(error)) from None
    ffi = FFI()
    ffi.cdef(_INTERFACE)
    try:
        get = (library := ffi.dlopen(path, ffi.RTLD_NOW)).krunfw_get_kernel
    except OSError as error:  # the loader's words: no ELF file, another architecture
        raise _UnusableError(str(error)) from None
    except AttributeError:
        raise _UnusableError("it has no function krunfw_get_kernel") from None
    load, entry, size = ffi.new("uint64_t *"), ffi.new("uint64_t *"), ffi.new("size_t *")
    start = get(load, entry, size)
    if not start or not size[0]:
        raise _UnusableError("it holds no kernel")
    offset = _offset(int(ffi.cast("uintptr_t", start)), size[0])
    kernel = bytes(ffi.buffer(start, size[0]))
    del library  # up to here its memory was in use
    if data[offset : offset + len(kernel)] != kernel:
        raise _UnusableError("its kernel in memory differs from its file")
    if not load[0] <= entry[0] < load[0] + len(kernel):
        raise _UnusableError(f"its kernel begins to run at {entry[0]:#x}, which is outside of it")
    # init/version.c: linux_banner
    release = re.search(rb"Linux version ([0-9][\w.+-]*) ", kernel)
    if release is None:
        raise _UnusableError("its kernel does not say which Linux it is")
    return {
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "offset": offset,
        "length": len(kernel),
        "load": load[0],
        "entry": entry[0],
        "release": release[1].decode(),
    }


def _offset(address: int, length: int) -> int:
    """Where in the mapped file `length` bytes of this process's memory are (proc_pid_maps(5))."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, _, inode = line.split()[:5]
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address and address + length <= last and inode != "0":
            return int(offset, 16) + address - first
    raise _UnusableError("its kernel is not in the file as it is in memory")
