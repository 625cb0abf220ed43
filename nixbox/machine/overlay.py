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


def filesystem_mib(path: Path) -> int:
    """The size of the ext4 file system on the disk, which is smaller than the disk until the guest has grown it.

    ext4's superblock (kernel documentation, filesystems/ext4/super.rst): at byte 1024, little-endian.
    """
    with path.open("rb") as file:
        file.seek(1024)
        block = file.read(1024)
    if block[0x38:0x3A] != b"\x53\xef":
        raise NixboxError(f"{path} holds no ext4 file system", hint="restore it from a backup, or `nixbox rm`")
    low, high = int.from_bytes(block[4:8], "little"), int.from_bytes(block[0x150:0x154], "little")
    block_size = 1024 << int.from_bytes(block[0x18:0x1C], "little")
    return ((high << 32) + low) * block_size >> 20


def grow(path: Path, to_mib: int) -> None:
    """Make a disk larger; its file system is grown by the guest at the next start, while it is mounted.

    Nothing here can be cut off half done: a longer file is a longer file.
    """
    os.truncate(path, to_mib << 20)
