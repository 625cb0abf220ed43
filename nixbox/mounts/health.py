"""How the shared directories of a running machine are: whether their processes live, and what of the host is gone."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from nixbox import locks
from nixbox.plan.model import Shared

MANY_DESCRIPTORS = 100_000


def lock_file(runtime: Path, tag: str) -> Path:
    """The lock that whoever serves a mount holds: its virtiofsd, or a hypervisor that does it itself."""
    return runtime / f"{tag}.lock"


def hold(runtime: Path, tag: str) -> int:
    """Take that lock; the descriptor is for whoever serves the mount to inherit. Raises OSError."""
    lock = os.open(lock_file(runtime, tag), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def lives(runtime: Path, tag: str) -> bool:
    """Whether whoever serves a mount is there."""
    return locks.held(lock_file(runtime, tag))


def descriptors(pid: int) -> int:
    """How many descriptors a process has: virtiofsd one for each file that its guest remembers."""
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return 0


def trouble(runtime: Path, one: Shared) -> str | None:
    """What is wrong with a directory that a running machine should have; None when nothing is."""
    if not one.tag:
        return "not mounted"
    if not lives(runtime, one.tag):
        return "its process has ended"
    try:
        info = Path(one.source).stat()
    except OSError as error:
        return f"the host's directory cannot be reached: {error.strerror}"
    if (info.st_dev, info.st_ino) != (one.device, one.inode):
        return "the host's directory was replaced"
    return None
