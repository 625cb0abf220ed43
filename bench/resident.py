"""In the emulated KVM host: keep in memory what its commands open, as any host's page cache does.

There, this host's files come over 9p, and even those whose contents are cached cost a message or two to open: the
modules of one command alone, half a second of Python's. Opened files are told by fanotify(7) and copied into the
upper layer of the box's overlay, a tmpfs, by setting their times to what they are.

    python -m bench.resident LIST            print the number of a process that notes what is opened from now on, and
                                             writes it into LIST when it is ended by SIGTERM
    python -m bench.resident LIST EXCEPT…    copy what LIST names, but nothing below these directories
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

# include/uapi/linux/fanotify.h
_CLASS_NOTIF, _UNLIMITED_QUEUE = 0, 0x10
_MARK_ADD, _MARK_FILESYSTEM = 0x1, 0x100
_OPEN, _OPEN_EXEC = 0x20, 0x1000
_EVENT = struct.Struct("=IBBHQii")  # length, version, reserved, length of these, mask, descriptor, process


def note(listed: Path) -> None:
    """Begin to note what is opened below `/`, in a process of its own. Raises OSError."""
    listed.unlink(missing_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    events = libc.fanotify_init(_CLASS_NOTIF | _UNLIMITED_QUEUE, os.O_RDONLY | os.O_CLOEXEC)
    marked = libc.fanotify_mark(events, _MARK_ADD | _MARK_FILESYSTEM, ctypes.c_uint64(_OPEN | _OPEN_EXEC), -1, b"/")
    if events < 0 or marked < 0:
        raise OSError(ctypes.get_errno(), "fanotify")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    child = os.fork()
    if child:
        print(child)
        return
    found: set[str] = set()
    try:
        while True:
            data = os.read(events, 1 << 16)
            at = 0
            while at < len(data):
                length, *_, fd, _ = _EVENT.unpack_from(data, at)
                at += length
                found.add(str(Path(f"/proc/self/fd/{fd}").readlink()))
                os.close(fd)
    finally:
        whole = listed.with_name(f"{listed.name}.new")
        whole.write_text("\0".join(sorted(found)))
        whole.replace(listed)


def copy(listed: Path, apart_from: Sequence[str]) -> None:
    """Copy into the upper layer what the file names; what was made there has the file's own device."""
    upper = listed.stat().st_dev
    for name in listed.read_text().split("\0"):
        path = Path(name)
        if path.is_file() and not any(path.is_relative_to(directory) for directory in apart_from):
            info = path.stat()
            if info.st_dev != upper:
                os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        note(Path(sys.argv[1]))
    else:
        copy(Path(sys.argv[1]), sys.argv[2:])
