"""The overlay disk: a sparse ext4 file, the writable upper layer of one machine."""

from __future__ import annotations

import os
from pathlib import Path

from nixbox import run
from nixbox.errors import NixboxError

_TIMEOUT_S = 120.0


def create(path: Path, size_mib: int) -> None:
    """Make an empty overlay disk of `size_mib` MiB, whole or not at all. Raises NixboxError on a full disk."""
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600)
    try:
        os.ftruncate(fd, size_mib << 20)
        argv = ["mke2fs", "-q", "-t", "ext4", "-F", "-m", "0", "-L", "nixbox-overlay"]
        # Lazy tables: the guest's kernel writes them when it is idle; root owns the top.
        argv += ["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0", str(temporary)]
        run.run(argv, timeout_s=_TIMEOUT_S, hint="is the disk of the workspace full?")
        os.fsync(fd)
        temporary.replace(path)
    except OSError as error:
        raise NixboxError(f"cannot make the overlay disk {path}: {error.strerror}") from None
    finally:
        os.close(fd)
        temporary.unlink(missing_ok=True)


def size_mib(path: Path) -> int:
    """The size that the guest sees."""
    return path.stat().st_size >> 20


def allocated_bytes(path: Path) -> int:
    """What the file takes on the host's disk."""
    return path.stat().st_blocks * 512


def grow(path: Path, to_mib: int) -> None:
    """Grow a disk that no VM uses. Raises CommandError when the file system needs a repair by hand."""
    # e2fsck: 0 clean, 1 corrected (e2fsck(8)); resize2fs insists on a check first.
    checked = run.run(["e2fsck", "-f", "-p", str(path)], timeout_s=_TIMEOUT_S, check=False)
    if checked.code > 1:
        raise run.CommandError(["e2fsck", "-f", "-p", str(path)], checked.code, checked.stdout)
    os.truncate(path, to_mib << 20)
    run.run(["resize2fs", str(path)], timeout_s=_TIMEOUT_S)
