"""Files that are mostly holes, such as a guest's memory. For every process of ours: few imports (ADR 028)."""

from __future__ import annotations

import errno
import fcntl
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_FICLONE = 0x40049409  # ioctl_ficlone(2)


def extents(fd: int) -> Iterator[tuple[int, int]]:
    """Start and end of everything that is not a hole (lseek(2), SEEK_DATA)."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def copy_data(source: int, target: int) -> None:
    """Make the empty file `target` (a descriptor) a copy of `source`. Raises OSError."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return
    except OSError:  # another file system, or one that cannot
        pass
    os.ftruncate(target, os.fstat(source).st_size)
    for start, end in extents(source):
        os.lseek(target, start, os.SEEK_SET)
        at = start
        while at < end:
            copied = os.sendfile(target, source, at, end - at)
            if copied == 0:  # it became shorter meanwhile
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            at += copied
